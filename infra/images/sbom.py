"""Bill of materials of the image it runs in: CycloneDX JSON of this Python's distributions and Debian's packages."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, distributions
from typing import Any
from urllib.parse import quote

DPKG_FORMAT = "${Package} ${Version} ${Architecture} ${db:Status-Abbrev}\n"


def sbom() -> dict[str, Any]:
    """The document. Without a time or a serial number: the same image has the same bill."""
    components = [*python_components(), *debian_components(_dpkg(), platform.freedesktop_os_release())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": sys.prefix, "bom-ref": "image"}},
        "components": sorted(components, key=lambda component: component["purl"]),
    }


def python_components() -> list[dict[str, Any]]:
    """One component per installed distribution, with its licence where its metadata names one.

    Where the environment lies above another one, both versions of a distribution are in the image.
    """
    found = (_python_component(_normal(d.metadata["Name"]), d) for d in distributions())
    return list({component["purl"]: component for component in found}.values())


def debian_components(listing: str, system: Mapping[str, str]) -> list[dict[str, Any]]:
    """Components from `dpkg-query`'s lines of name, version, architecture and status; only what is installed.

    Args:
        listing: the lines.
        system: of os-release. Debian and Ubuntu fix other versions, so a scanner must know whose package it is.
    """
    vendor, release = system["ID"], f"{system['ID']}-{system.get('VERSION_ID', '')}".rstrip("-")
    components = []
    for line in listing.splitlines():
        name, version, architecture, status = line.split()
        if status.startswith("ii"):
            purl = f"pkg:deb/{vendor}/{quote(name)}@{quote(version)}?arch={architecture}&distro={release}"
            components.append({"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl})
    return components


def _python_component(name: str, distribution: Distribution) -> dict[str, Any]:
    # A local label such as +cpu is part of the version; the purl's grammar wants its plus sign escaped.
    purl = f"pkg:pypi/{name}@{distribution.version.replace('+', '%2B')}"
    component: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": distribution.version,
        "purl": purl,
        "bom-ref": purl,
    }
    if "License-Expression" in distribution.metadata:
        component["licenses"] = [{"expression": distribution.metadata["License-Expression"]}]
    return component


def _normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _dpkg() -> str:
    """Debian's packages; empty on a base image of another family, which has no dpkg."""
    try:
        return subprocess.run(
            ["dpkg-query", "-W", "-f", DPKG_FORMAT], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    json.dump(sbom(), sys.stdout, indent=1)
    print()
