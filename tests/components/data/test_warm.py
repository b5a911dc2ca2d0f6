"""Filling a node's cache: every weight file has its digest, or the pod says which has not."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data import warm as module
from nvila.components.data.warm import digests_of, main, warm


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "weights"
    (folder / "llm").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "llm" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_matching_files_pass_and_are_read_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every restart of a node would otherwise read all its weights."""
    read: list[Path] = []
    genuine = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: (read.append(path), genuine(path))[1])
    named = {str(weights): {"llm/model.safetensors": _digest(b"weights"), "config.json": _digest(b"{}")}}
    warm(named)
    assert len(read) == 2
    warm(named)
    assert len(read) == 2
    (weights / "config.json").write_bytes(b"{ }")
    with pytest.raises(DataError):
        warm(named)


def test_another_file_is_refused_and_removed(weights: Path) -> None:
    """A damaged shard trains into garbage; left in place it would stay damaged for ever."""
    with pytest.raises(DataError, match=r"llm/model\.safetensors: a file has another digest") as caught:
        warm({str(weights): {"llm/model.safetensors": _digest(b"others")}})
    found, wanted = _digest(b"weights"), _digest(b"others")
    assert f"got '{found}'" in str(caught.value) and f"The list says {wanted}" in str(caught.value)
    assert not (weights / "llm" / "model.safetensors").exists()
    assert (weights / "config.json").exists()


def test_another_digest_is_looked_at_again(weights: Path) -> None:
    """What was noted belongs to the digest of that time, not to the file's name."""
    warm({str(weights): {"llm/model.safetensors": _digest(b"weights")}})
    with pytest.raises(DataError, match="another digest"):
        warm({str(weights): {"llm/model.safetensors": _digest(b"others")}})


def test_weights_without_a_digest_are_refused(weights: Path) -> None:
    """A list that names one shard of four verifies a quarter."""
    with pytest.raises(DataError, match=r"weights without a digest \(got \['llm/model\.safetensors'\]\)"):
        warm({str(weights): {"config.json": _digest(b"{}")}})


def test_a_named_file_that_is_missing_is_refused(weights: Path) -> None:
    """A repository that lost a shard must not pass because there is nothing to compare."""
    digests = {"llm/model.safetensors": _digest(b"weights"), "llm/more.safetensors": _digest(b"more")}
    with pytest.raises(DataError, match="a named file is missing"):
        warm({str(weights): digests})


def test_printed_digests_are_what_the_list_wants(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented way to a list must lead to one that passes."""
    main(["--digests", str(weights)])
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed
        == {str(weights): digests_of(str(weights))}
        == {str(weights): {"llm/model.safetensors": _digest(b"weights")}}
    )
    warm(printed)


def test_a_link_is_removed_with_what_it_leads_to(weights: Path) -> None:
    """In the hub's cache files are links: without the target the next download would find it finished."""
    blob = weights.parent / "blob"
    blob.write_bytes(b"damaged")
    (weights / "llm" / "model.safetensors").unlink()
    (weights / "llm" / "model.safetensors").symlink_to(blob)
    with pytest.raises(DataError, match="another digest"):
        warm({str(weights): {"llm/model.safetensors": _digest(b"weights")}})
    assert not blob.exists()


def test_the_program_ends_with_the_exit_code_of_the_error(weights: Path, tmp_path: Path) -> None:
    """A pod that exits with 0 counts as a warm node."""
    listed = tmp_path / "weights.json"
    listed.write_text(json.dumps({str(weights): {"llm/model.safetensors": _digest(b"others")}}))
    ran = subprocess.run([sys.executable, "-m", module.__name__, str(listed)], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.startswith("warm: ") and "Traceback" not in ran.stderr
    with pytest.raises(ConfigError, match="usage"):
        main([])
