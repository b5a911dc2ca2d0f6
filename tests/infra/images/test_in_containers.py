"""The images that `make images` has built: what is in them, and steps of the micro recipe run inside."""

import json
import os
import re
from pathlib import Path

import first_steps
import pytest
from first_steps import IMAGE, STEPS, InContainers, contain, podman, run_first_steps

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.data.demo import ensure
from nvila.infra.images.machine import pip_settings

pytestmark = pytest.mark.containers
ROOT = Path(__file__).parents[3]
TRIES = 10


@pytest.fixture(scope="module", autouse=True)
def _image() -> None:
    if reason := first_steps.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with the data of `micro`, open to the container's user."""
    made = tmp_path_factory.mktemp("contained")
    made.chmod(0o777)
    before = Path.cwd()
    os.chdir(made)
    try:
        for source in fill_in(Form(recipe="micro")).data.sources:
            ensure(source)
    finally:
        os.chdir(before)
    return made


def test_steps_in_containers_make_what_they_make_in_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library, a file of the package or a setting that differs in the image would show in a key or a digest."""
    monkeypatch.chdir(folder)
    outside = run_first_steps(folder / "outside", contained=False)
    inside = run_first_steps(folder / "inside", contained=True)
    assert {step: inside[step].key for step in STEPS} == {step: outside[step].key for step in STEPS}
    assert {step: inside[step].digest for step in STEPS} == {step: outside[step].digest for step in STEPS}
    owners = {path.stat().st_uid for path in (folder / "inside/store").rglob("manifest.json")}
    assert owners == {65532}


def test_a_failing_step_is_reported_every_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that is gone before its exit status is read must not pass for a success."""
    monkeypatch.chdir(folder)
    InContainers.codes.clear()
    for _ in range(TRIES):
        with pytest.raises(RuntimeError, match="resolve"):
            run_first_steps(folder / "failing", contained=True, overrides={"evaluate": {"limitt": 1}})
    assert InContainers.codes == [Exit.USER] * TRIES
    status = json.loads((folder / "failing/runs/only/steps/resolve.json").read_text())
    assert status["exit_code"] == Exit.USER and "limitt" in status["message"]


def test_the_image_says_what_it_was_made_from(tmp_path: Path) -> None:
    """An image that cannot be traced to its commit and its lock cannot be trusted a year later."""
    (image,) = json.loads(podman("inspect", IMAGE, capture_output=True, check=True).stdout)
    labels = image["Config"]["Labels"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert labels["org.opencontainers.image.base.name"] and labels["nvila.lock"].startswith("sha256:")
    code, bill = contain(IMAGE, ["cat", "/opt/nvila/sbom.cdx.json"], tmp_path, {})
    components = {(part["name"], part["version"].partition("+")[0]) for part in json.loads(bill)["components"]}
    lock = (ROOT / "requirements/main.lock").read_text().splitlines()
    locked = {tuple(line.split("==")) for line in lock if "==" in line and not line.startswith("#")}
    assert code == 0 and {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in locked} <= components
    assert "libc6" in {name for name, _ in components}


def test_nothing_of_the_build_stays_in_the_image(tmp_path: Path) -> None:
    """pip's settings may hold a password; neither they nor the places they name may be in a layer or in the history."""
    (image,) = json.loads(podman("inspect", IMAGE, capture_output=True, check=True).stdout)
    recorded = json.dumps([image["Config"], image["History"]])
    settings, mounts = pip_settings(tmp_path)
    values = {line.partition(" = ")[2] for line in settings.read_text().splitlines() if "://" in line}
    assert not [value for value in [*values, *(mount.partition(":")[0] for mount in mounts)] if value in recorded]
    listing = "find /run/pip /run/secrets /var/cache/pip /etc/pip.conf /root -type f -size +0 2>/dev/null; true"
    assert contain(IMAGE, ["sh", "-c", listing], tmp_path, {}) == (0, "")


@pytest.mark.parametrize("target", ["base", "serve", "quantize", "controller"])
def test_no_base_image_no_build(target: str) -> None:
    """A default would be an image that nobody of the site has chosen."""
    file = "infra/images/Containerfile"
    ran = podman("build", "--file", file, "--target", target, ".", cwd=ROOT, capture_output=True)
    assert ran.returncode != 0 and "BASE_IMAGE" in ran.stderr
