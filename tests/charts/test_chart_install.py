"""The chart on a real API server: install, upgrade, rollback, uninstall, and the rights that it gives."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helming import CHART
from places import RELEASE, Place

pytestmark = pytest.mark.cluster
KINDS = (
    "configmaps,secrets,serviceaccounts,services,persistentvolumeclaims,persistentvolumes,deployments,statefulsets,"
    "daemonsets,jobs,pods,roles,rolebindings,networkpolicies,clustertrainingruntimes,resourceflavors,clusterqueues,"
    "localqueues,pipelines.pipelines.kubeflow.org,pipelineversions,servicemonitors,prometheusrules"
)
"""Every kind that the chart makes, or that is made from it."""


def _objects(place: Place) -> set[str]:
    """KIND/NAMESPACE/NAME of what belongs to the release, helm's own records of it among them."""
    mine = {place.namespace, *place.extra}
    found: set[str] = set()
    for selector in (f"app.kubernetes.io/instance={RELEASE}", f"owner=helm,name={RELEASE}"):
        for item in place.cluster.get(KINDS, "--all-namespaces", "--selector", selector)["items"]:
            name, namespace = item["metadata"]["name"], item["metadata"].get("namespace", "")
            # Those of the test before may still be on their way out.
            if (namespace or name.removeprefix("nvila-cache-")) in mine or (not namespace and "cache" not in name):
                found.add(f"{item['kind']}/{namespace}/{name}")
    return found


def _names(place: Place, kind: str) -> set[str]:
    return {name.rpartition("/")[2] for name in _objects(place) if name.startswith(f"{kind}/")}


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """The chart one version ago: without queues and alerts, and with another pipeline."""
    chart = tmp_path / "nvila-platform"
    shutil.copytree(CHART, chart)
    for name in ("kueue.yaml", "monitoring.yaml"):
        (chart / "templates" / name).unlink()
    for path in (chart / "files/pipelines").glob("lifecycle.yaml"):
        path.write_text(path.read_text(encoding="utf-8").replace("NVILA lifecycle", "NVILA"), encoding="utf-8")
    description = chart / "Chart.yaml"
    text = re.sub(r"(?m)^version: .*", "version: 0.0.9", description.read_text(encoding="utf-8"))
    description.write_text(text, encoding="utf-8")
    return chart


def test_install_upgrade_rollback_uninstall(make_place: Callable[..., Place], previous: Path) -> None:
    """An upgrade that meets an immutable field, or an uninstall that leaves something behind, shows only here."""
    place = make_place("team-a", "team-b")
    said = place.release(previous)
    first = _names(place, "PipelineVersion")
    assert len(first) == 2 and not _names(place, "ClusterQueue")
    _reports(place, said)

    place.release()
    second = _names(place, "PipelineVersion")
    assert len(second) == 2 and second != first
    assert (_names(place, "ClusterQueue"), _names(place, "PrometheusRule")) == ({"nvila"}, {"nvila"})
    for namespace in place.extra:
        assert {f"LocalQueue/{namespace}/nvila", f"ConfigMap/{namespace}/nvila-site"} <= _objects(place)

    place.release(trainer={"cpu": "8", "memory": "64Gi"}, s3={"bucket": "other"})
    place.cluster.helm("rollback", RELEASE, "1", "--namespace", place.namespace)
    assert _names(place, "PipelineVersion") == first and not _names(place, "ClusterQueue")

    place.uninstall()
    assert _objects(place) == set()


def _reports(place: Place, said: str) -> None:
    """What the notes say of this cluster: it has every custom resource of the folder, and JobSet is not among them."""
    lines = {line[12:].partition(":")[0]: line for line in said.splitlines() if line.startswith("  [")}
    for there in ("Kubeflow Trainer (ClusterTrainingRuntime)", "Kueue (ClusterQueue)", "Gateway API (HTTPRoute)"):
        assert lines[there].startswith("  [ok]")
    for lacking in ("JobSet", *(f"Secret {name}/nvila-credentials" for name in (place.namespace, *place.extra))):
        assert lines[lacking].startswith("  [missing]"), said
    classes = place.cluster.get("storageclasses")["items"]
    default = any("true" in str(item["metadata"].get("annotations", {})) for item in classes)
    assert lines["a default storage class"].startswith("  [ok]" if default else "  [missing]")
    assert lines[f"Secret {place.namespace}/nvila-postgres"].startswith("  [ok]")


def test_uninstall_keeps_the_data_unless_told(make_place: Callable[..., Place]) -> None:
    """Months of runs and the registry must not go with a mistyped command."""
    place = make_place()
    place.release(storage={"keep": True}, mlflow={"postgres": {"keep": True}})
    place.uninstall()
    claims = {"nvila", "nvila-postgres"}
    assert _objects(place) == {f"PersistentVolumeClaim/{place.namespace}/{name}" for name in claims}
    place.release(storage={"keep": True}, mlflow={"postgres": {"keep": True}})
    place.cluster.kubectl("delete", "pvc", "-n", place.namespace, *claims, "--wait=false")


def test_what_the_server_cannot_hold_is_refused_before_anything_is_made(make_place: Callable[..., Place]) -> None:
    """Half an install is worse than none."""
    place = make_place()
    if place.cluster.minor() >= 21:
        pytest.skip("this server can hold all of it")
    options = ["--namespace", place.namespace, "--set", "mlflow.replicas=2"]
    ran = place.cluster.try_helm("install", RELEASE, CHART, *options)
    assert ran.returncode != 0 and "mlflow.backup.enabled needs batch/v1 CronJob" in ran.stderr
    ran = place.cluster.try_helm("install", RELEASE, CHART, *options, "--set", "mlflow.backup.enabled=false")
    assert ran.returncode != 0 and "podDisruptionBudgets.enabled needs policy/v1" in ran.stderr
    assert _objects(place) == set()


def test_a_run_may_do_what_it_must_and_nothing_else(make_place: Callable[..., Place]) -> None:
    """Too few rights stop the first training job; too many let a step read everybody's secrets."""
    place = make_place("team")
    place.release(kueue={"enabled": False})
    (team,) = place.extra

    def may(verb: str, resource: str, namespace: str = team) -> bool:
        who = f"--as=system:serviceaccount:{team}:pipeline-runner"
        said = place.cluster.kubectl("auth", "can-i", verb, resource, who, "-n", namespace, check=False)
        return said.splitlines()[-1] == "yes"

    jobs = "trainjobs.trainer.kubeflow.org"
    assert all(may(verb, jobs) for verb in ("create", "get", "list", "watch", "patch", "delete"))
    assert all(may(verb, "pods") and may(verb, "pods/log") for verb in ("get", "list", "watch"))
    assert may("list", "events")
    refused = [("get", "secrets"), ("create", "pods"), ("create", "pods/exec"), ("update", jobs), ("list", "nodes")]
    assert [case for case in refused if may(*case)] == []
    assert not may("create", jobs, "default") and not may("get", "pods", place.namespace)


def test_somebody_elses_configuration_is_not_taken_over(make_place: Callable[..., Place]) -> None:
    """KFP or its profile controller may own kfp-launcher; then the install must stop and the default must help."""
    place = make_place()
    place.cluster.kubectl("create", "configmap", "kfp-launcher", "-n", place.namespace)
    with pytest.raises(AssertionError, match=r'ConfigMap "kfp-launcher" .*exists and cannot be imported'):
        place.release(pipelines={"launcherConfig": True})
    place.release(pipelines={"launcherConfig": False})
    assert place.cluster.get("configmap", "kfp-launcher", "-n", place.namespace).get("data") is None
