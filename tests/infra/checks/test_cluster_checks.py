"""What `helm test` asks, without a cluster: services that are away or wrong, and two pods at one folder."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvila.components.contracts.errors import PreflightError, Unreachable
from nvila.infra.checks import locks, services


def _pod(name: str, folder: Path) -> subprocess.Popen[str]:
    program = (
        "import sys\nfrom pathlib import Path\nfrom nvila.infra.checks.locks import meet\n"
        "print(meet(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))"
    )
    command = [sys.executable, "-c", program, str(folder), name, f"node-{name}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_pods_see_each_others_lock(tmp_path: Path) -> None:
    """Whoever comes first, both must end, and the volume be as it was."""
    pods = [_pod(name, tmp_path / "t") for name in ("b", "a")]
    said = {pod.communicate(timeout=60)[0] for pod in pods}
    assert said == {"a lock is seen by another pod: node-a and node-b\n"}
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_the_other_does_not_see_fails_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pod that ends well makes a test of helm's look passed to who reads its log alone."""
    monkeypatch.setattr(locks, "is_held", lambda path: False)
    with ThreadPoolExecutor() as pool:
        pods = [pool.submit(locks.meet, tmp_path / "t", name, f"node-{name}") for name in "ab"]
        for pod in pods:
            with pytest.raises(PreflightError, match=r"not seen by another .node-a and node-b"):
                pod.result(60)


def test_a_pod_that_stays_alone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next test of that name would take it for a pod that is there."""
    monkeypatch.setattr(locks, "MEET_SECONDS", 0.0)
    with pytest.raises(Unreachable, match="another pod"):
        locks.meet(tmp_path / "t", "a", "n")
    assert list((tmp_path / "t").iterdir()) == []


def test_every_service_is_asked_and_the_first_error_counts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who mends one thing at a time needs as many installs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("nvila.components.tracking.connect.PATIENCE_SECONDS", 0.0)
    assert services.main(["--mlflow", "--write", "s3://bucket", "--pipelines", "http://127.0.0.1:9"]) == 75
    said = capfd.readouterr().err
    for name in ("MLflow", "S3", "Kubeflow Pipelines"):
        assert f"[failed] {name}: " in said
