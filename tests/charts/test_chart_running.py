"""The chart's pods at work on a real node: MLflow on Postgres and S3, its backup, and the cache of weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helming import Document, find, render, tool
from places import PASSWORD, Cluster, Place

pytestmark = pytest.mark.cluster
BUCKET, KEY, SECRET = "nvila", "test-key", "test-secret"
WEIGHTS = b"weights of a test"


@dataclass(frozen=True)
class Store:
    """A real S3 server on this machine, where the node's pods reach it."""

    endpoint: str

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )

    def objects(self) -> list[str]:
        found = self.client().list_objects_v2(Bucket=BUCKET)
        return [item["Key"] for item in found.get("Contents", [])]


def _free_ports(address: str, count: int) -> list[int]:
    """SeaweedFS takes a second port 10000 above each; so they are low."""
    sockets = [socket.socket() for _ in range(count)]
    found = []
    for port in range(18100, 18900, 7):
        if len(found) == count:
            break
        try:
            sockets[len(found)].bind((address, port))
            found.append(port)
        except OSError:
            continue
    for one in sockets:
        one.close()
    return found


@pytest.fixture(scope="module")
def store(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    address = cluster.address()
    folder = tmp_path_factory.mktemp("s3")
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = _free_ports(address, 4)
    command = [
        tool("weed"),
        "server",
        f"-ip={address}",
        f"-ip.bind={address}",
        f"-dir={folder}",
        "-s3",
        f"-s3.port={s3}",
    ]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-volume.max=8"]
    command += [f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            made = Store(f"http://{address}:{s3}")
            _eventually(lambda: made.client().create_bucket(Bucket=BUCKET), 60)
            yield made
        finally:
            server.terminate()


def _eventually(attempt: Any, seconds: float) -> Any:
    """What `attempt` returns once it does not fail."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.fixture
def place(running: Place, store: Store) -> Place:
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    literals = [f"--from-literal={name}={value}" for name, value in credentials.items()]
    running.cluster.kubectl("create", "secret", "generic", "nvila-credentials", "-n", running.namespace, *literals)
    running.values["s3"] = {"bucket": BUCKET, "endpoint": store.endpoint}
    running.values["cache"]["warmup"] = _warmup(WEIGHTS)
    for name, body in (("config.json", b"{}"), ("model.safetensors", WEIGHTS)):
        store.client().put_object(Bucket=BUCKET, Key=f"weights/{name}", Body=body)
    return running


def _warmup(content: bytes) -> dict[str, Any]:
    digests = {"model.safetensors": hashlib.sha256(content).hexdigest()}
    return {"enabled": True, "weights": {f"s3://{BUCKET}/weights": digests}}


def test_the_platform_at_work(place: Place, store: Store) -> None:
    """Probes, read-only file systems, users, addresses and digests fit together only on a node."""
    place.release()
    with _mlflow(place) as mlflow:
        experiment = mlflow.create_experiment("kept")
        run = mlflow.create_run(experiment)
        mlflow.log_text(run.info.run_id, "an answer", "answers.txt")
    assert [key for key in store.objects() if key.startswith("mlflow/") and key.endswith("/answers.txt")]
    _prometheus_is_answered(place)
    _the_cache_is_warm(place)
    _back_up(place, store)

    # A node must not count as warm with weights that nobody has vouched for; MLflow is not touched by that.
    with pytest.raises(AssertionError, match=r"DaemonSet/.*nvila-warmup not ready"):
        place.release(seconds=30, cache={"warmup": _warmup(b"others")})
    _eventually(lambda: _is_told(place, "a file has another digest; it has been removed"), 60)

    place.release(mlflow={"workers": 2})
    with _mlflow(place) as mlflow:
        assert mlflow.get_experiment_by_name("kept").experiment_id == experiment
    place.uninstall()
    assert _weights(place).exists()


@contextmanager
def _mlflow(place: Place) -> Iterator[Any]:
    """A client, by the way that the notes name."""
    from mlflow import MlflowClient

    command = [tool("kubectl"), "--kubeconfig", place.cluster.kubeconfig, "port-forward", "-n", place.namespace]
    with subprocess.Popen([*command, "service/nvila-mlflow", ":5000"], stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            address = re.findall(r"127\.0\.0\.1:\d+", forward.stdout.readline())[0]
            client = MlflowClient(f"http://{address}")
            _eventually(client.search_experiments, 60)
            yield client
        finally:
            forward.terminate()


def _prometheus_is_answered(place: Place) -> None:
    """It asks each pod by its address, which the guard against foreign host names must let through."""
    (pod,) = place.cluster.get("pods", "-n", place.namespace, "-l", "app.kubernetes.io/component=mlflow")["items"]
    with urllib.request.urlopen(f"http://{pod['status']['podIP']}:5000/metrics", timeout=30) as answer:
        assert "mlflow_http_request_total{" in answer.read().decode()


def _the_cache_is_warm(place: Place) -> None:
    """Fetched by the DaemonSet, into the node's own folder, by a user without rights."""
    weights = _weights(place)
    assert weights.read_bytes() == WEIGHTS and weights.stat().st_uid == 65532
    log = place.cluster.kubectl("logs", "-n", place.namespace, "daemonset/nvila-warmup", "-c", "fetch")
    assert "1 files verified" in log


def _is_told(place: Place, text: str) -> None:
    """By the last try, which the kubelet may just be clearing away for the next one."""
    said = place.cluster.kubectl("logs", "-n", place.namespace, "daemonset/nvila-warmup", "-c", "fetch")
    assert text in said


def _weights(place: Place) -> Path:
    """Where the node keeps them: the folder's name begins with a digest of endpoint and bucket."""
    (found,) = (place.folder / "cache" / "s3").glob("*-weights/model.safetensors")
    return found


def _back_up(place: Place, store: Store) -> None:
    """One run of the CronJob's pod, and the dump read into another database."""
    job = _backup_job(place)
    place.cluster.apply(job)
    place.cluster.kubectl("wait", "--for=condition=complete", "job/backup", "-n", place.namespace, "--timeout=120s")
    (key,) = [key for key in store.objects() if key.startswith("backups/mlflow/")]
    dump = store.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
    database = ["exec", "-i", "-n", place.namespace, "nvila-postgres-0", "--", "env", f"PGPASSWORD={PASSWORD}"]
    command = [tool("kubectl"), "--kubeconfig", place.cluster.kubeconfig, *database]
    subprocess.run([*command, "createdb", "-h", "127.0.0.1", "-U", "mlflow", "restored"], check=True)
    restore = ["pg_restore", "-h", "127.0.0.1", "-U", "mlflow", "--dbname=restored", "--exit-on-error"]
    subprocess.run([*command, *restore], input=dump, check=True)
    ask = ["psql", "-h", "127.0.0.1", "-U", "mlflow", "-At", "restored", "-c", "select name from experiments"]
    names = subprocess.run([*command, *ask], check=True, capture_output=True, text=True).stdout.split()
    assert "kept" in names
    place.cluster.kubectl("delete", "job/backup", "-n", place.namespace, "--cascade=foreground")


def _backup_job(place: Place) -> Document:
    """What the CronJob would start: older servers have no batch/v1 CronJob."""
    documents = render(sets=[f"s3.endpoint={json.dumps(place.values['s3']['endpoint'])}"])
    spec = find(documents, "CronJob", "nvila-backup")["spec"]["jobTemplate"]["spec"]
    pod = spec["template"]["spec"]
    pod["serviceAccountName"] = "default"
    for container in (*pod["initContainers"], *pod["containers"]):
        base = container["name"] == "upload"
        container["image"] = os.environ["NVILA_NODE_IMAGE" if base else "NVILA_POSTGRES_IMAGE"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "backup", "namespace": place.namespace},
        "spec": spec,
    }
