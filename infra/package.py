"""Packs the chart: an archive with its SHA-256, and the same as an OCI layout, from which registries are filled.

`python -m nvila.infra.package build/package --helm .tools/helm` (`make package`). The layout is what `helm push` makes
in a registry: a manifest with the chart's metadata as its configuration and the archive as its only layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from nvila.components.contracts.digests import sha256_file
from nvila.components.contracts.errors import NvilaError, PreflightError

CHART = Path(__file__).resolve().parents[1] / "charts" / "nvila-platform"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIGURATION = "application/vnd.cncf.helm.config.v1+json"
ARCHIVE = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
"""Media types of the OCI image specification and of Helm."""
LAYOUT = "oci"


def package(folder: Path, helm: str, chart: Path = CHART) -> tuple[Path, str]:
    """Pack the chart into a folder, whose archives and layout of before go; returns the archive and its SHA-256.

    Raises:
        PreflightError: no helm.
        NvilaError: helm refuses the chart; it has said why.
    """
    if shutil.which(helm) is None:
        raise PreflightError("helm is missing", where=helm, do="make tools")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{chart.name}-*.tgz*"):
        old.unlink()
    shutil.rmtree(folder / LAYOUT, ignore_errors=True)
    if subprocess.run([helm, "package", str(chart), "--destination", str(folder)], stdout=sys.stderr).returncode:
        raise NvilaError("the chart could not be packed", where=str(chart), do="helm says above why.")
    (archive,) = folder.glob(f"{chart.name}-*.tgz")
    digest = sha256_file(archive)
    archive.with_name(f"{archive.name}.sha256").write_text(f"{digest}  {archive.name}\n", encoding="utf-8")
    layout(archive, folder / LAYOUT, chart)
    return archive, digest


def layout(archive: Path, folder: Path, chart: Path = CHART) -> str:
    """Write the OCI layout of an archive; returns the digest of its manifest, by which a registry names the chart."""
    import yaml

    about = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    named = {"org.opencontainers.image.title": about["name"], "org.opencontainers.image.version": about["version"]}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _blob(folder, json.dumps(about).encode(), CONFIGURATION),
        "layers": [_blob(folder, archive.read_bytes(), ARCHIVE)],
        "annotations": named,
    }
    entry = _blob(folder, json.dumps(manifest).encode(), MANIFEST)
    entry |= {"annotations": {"org.opencontainers.image.ref.name": about["version"]}}
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return str(entry["digest"])


def _blob(folder: Path, content: bytes, kind: str) -> dict[str, Any]:
    """Keep some bytes under their digest; returns how a manifest names them."""
    digest = sha256(content).hexdigest()
    place = folder / "blobs" / "sha256" / digest
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}


def main(words: list[str]) -> int:
    """The program; prints what was made."""
    parser = argparse.ArgumentParser(prog="python -m nvila.infra.package", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--helm", default="helm")
    given = parser.parse_args(words)
    try:
        archive, digest = package(given.folder, given.helm)
    except NvilaError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    print(f"{archive}\nsha256:{digest}\n{given.folder / LAYOUT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
