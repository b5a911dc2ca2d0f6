"""The packed chart: what `make package` leaves is what a registry and `helm install` take."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from helming import CHART, helm, tool

from nvila.components.contracts.errors import PreflightError
from nvila.infra.package import ARCHIVE, package


def test_the_archive_and_the_layout_hold_the_chart(tmp_path: Path) -> None:
    """A registry refuses a manifest whose blobs are not what their digests say, after an upload of minutes."""
    (tmp_path / f"{CHART.name}-0.0.1.tgz").write_text("of an earlier version")
    archive, digest = package(tmp_path, tool("helm"))
    content = archive.read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert (tmp_path / f"{archive.name}.sha256").read_text() == f"{digest}  {archive.name}\n"
    assert [path.name for path in tmp_path.glob("*.tgz")] == [archive.name]
    blobs = {f"sha256:{path.name}": path.read_bytes() for path in (tmp_path / "oci/blobs/sha256").iterdir()}
    assert all(f"sha256:{hashlib.sha256(body).hexdigest()}" == name for name, body in blobs.items())
    (entry,) = json.loads((tmp_path / "oci/index.json").read_text())["manifests"]
    manifest = json.loads(blobs[entry["digest"]])
    (layer,) = manifest["layers"]
    assert blobs[layer["digest"]] == content and layer["mediaType"] == ARCHIVE and layer["size"] == len(content)
    assert json.loads(blobs[manifest["config"]["digest"]])["name"] == CHART.name
    assert entry["annotations"]["org.opencontainers.image.ref.name"] in archive.name
    # The compiled pipelines lie in it, without which the chart renders and installs nothing of them.
    rendered = helm(
        "template",
        "x",
        archive,
        "--set",
        "pipelines.mode=native",
        "--set",
        "trainer.enabled=false",
        "--set",
        "pipelines.launch=pods",
        "--api-versions",
        "pipelines.kubeflow.org/v2beta1/PipelineVersion",
    )
    assert "nvila-lifecycle" in rendered.stdout, rendered.stderr


def test_without_helm_it_is_said(tmp_path: Path) -> None:
    """A traceback names a file and not what to install."""
    with pytest.raises(PreflightError, match="make tools"):
        package(tmp_path, "no-such-helm")
