"""The chart's MLflow on a database that is not its own: a real Postgres that speaks TLS."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from places import PASSWORD, Place

pytestmark = pytest.mark.cluster


def test_an_external_database_must_show_its_certificate(running: Place) -> None:
    """libpq's default takes whoever answers at that address for the database, and talks in the clear if it says so."""
    host = f"database.{running.namespace}.svc"
    certificate, key = _certificate(host)
    _serve(running, certificate, key)
    _trust(running, certificate)
    running.values["mlflow"]["postgres"] = {"mode": "external", "host": host}
    running.release()
    tables = ("exec", "-n", running.namespace, "database", "--", "psql", "-U", "mlflow", "-At", "-c")
    assert "experiments" in running.cluster.kubectl(*tables, "select tablename from pg_tables")

    stranger, _ = _certificate(host)
    _trust(running, stranger)
    with pytest.raises(AssertionError, match=r"Deployment/.*nvila-mlflow not ready"):
        running.release(seconds=40, mlflow={"workers": 2})
    pod = ("-n", running.namespace, "-l", "app.kubernetes.io/component=mlflow", "-c", "schema")
    deadline, said = time.monotonic() + 120, ""
    while "certificate verify failed" not in said:  # between two attempts there is no log
        assert time.monotonic() < deadline, said
        time.sleep(1)
        said = running.cluster.kubectl("logs", *pod, "--tail=-1", check=False)


def _certificate(host: str) -> tuple[str, str]:
    """One that vouches for itself, and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM).decode(), private.decode()


def _trust(place: Place, authority: str) -> None:
    """Put it beside the password, as docs/cluster.md says."""
    metadata = {"name": "nvila-postgres", "namespace": place.namespace}
    data = {"password": PASSWORD, "ca.crt": authority}
    place.cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data})


def _serve(place: Place, certificate: str, key: str) -> None:
    """A Postgres that refuses to speak without TLS over the network, and its Service."""
    metadata = {"name": "database", "namespace": place.namespace, "labels": {"app": "database"}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
    settings = {"ssl": "on", "ssl_cert_file": "/tls/tls.crt", "ssl_key_file": "/tls/tls.key"}
    environment = {"POSTGRES_DB": "mlflow", "POSTGRES_USER": "mlflow", "POSTGRES_PASSWORD": PASSWORD}
    container = {
        "name": "postgres",
        "image": os.environ["NVILA_POSTGRES_IMAGE"],
        "imagePullPolicy": "IfNotPresent",
        "args": [part for name, value in settings.items() for part in ("-c", f"{name}={value}")],
        "env": [{"name": k, "value": v} for k, v in {**environment, "PGDATA": "/data/pgdata"}.items()],
        "readinessProbe": {"exec": {"command": ["pg_isready", "-h", "127.0.0.1"]}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "tls", "mountPath": "/tls"},
            {"name": "data", "mountPath": "/data"},
            {"name": "data", "mountPath": "/var/run/postgresql"},
        ],
    }
    tls = {"name": "tls", "secret": {"secretName": "database", "defaultMode": 0o440}}
    spec = {
        "containers": [container],
        "securityContext": {"runAsUser": 999, "runAsGroup": 999, "fsGroup": 999},
        "volumes": [tls, {"name": "data", "emptyDir": {}}],
    }
    service = {"selector": {"app": "database"}, "ports": [{"port": 5432}]}
    place.cluster.apply(
        {**secret, "stringData": {"tls.crt": certificate, "tls.key": key}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
    )
