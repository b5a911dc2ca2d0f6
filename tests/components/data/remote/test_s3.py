"""Weights from S3: what is taken, kept and removed, and what every fault of a server ends in."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket, served, sha256_header

from nvila.components.contracts.errors import ConfigError, DataError, NvilaError, Preempted, Unreachable
from nvila.components.data.fetch import fetch, fetch_version, identity
from nvila.components.data.remote import insist, received

MIB = 1 << 20
BIG = bytes(range(256)) * 4096 * 9
"""9 MiB: more than the client of before fetched in one piece."""
BODY = bytes(range(256)) * 1024
"""256 KiB, where the size does not matter."""


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_only_data_files_are_taken(s3: Bucket) -> None:
    """Code and pickles of a checkpoint must not even arrive; a longer prefix is another model."""
    expected = {"config.json": b"{}", "llm/merges.txt": b"a b", "llm/model.safetensors": b"weights"}
    assert _files(fetch("s3://b/m/")) == expected
    assert "GET m/modeling.py" not in s3.asked and "GET mm/config.json" not in s3.asked


def test_a_whole_bucket_and_an_empty_prefix(s3: Bucket) -> None:
    """`s3://bucket` without a prefix is a place too; a prefix without weights is an error, and no name is none."""
    assert (fetch("s3://b") / "mm" / "config.json").read_bytes() == b"other"
    with pytest.raises(DataError, match="s3://b/none: no weights under this prefix"):
        fetch("s3://b/none")
    with pytest.raises(ConfigError, match="weights are named by"):
        fetch("s3://")


@pytest.mark.parametrize("name", ["m/../../../evil.json", "m//etc/evil.json"])
def test_an_object_cannot_leave_its_folder(s3: Bucket, tmp_path: Path, name: str) -> None:
    """A name in somebody's bucket must not overwrite files of this machine."""
    s3.put(name, b"evil")
    with pytest.raises(DataError, match="leads out of its prefix"):
        fetch("s3://b/m")
    assert not list(tmp_path.rglob("evil.json*"))


def test_what_is_there_is_not_fetched_again(s3: Bucket) -> None:
    """A hundred gigabytes once."""
    folder = fetch("s3://b/m")
    assert fetch("s3://b/m/") == folder and len(s3.downloads()) == 3


def test_a_replaced_object_is_fetched_again(s3: Bucket) -> None:
    """Other bytes of one size, uploaded by a machine whose clock is behind ours: size and time tell nothing."""
    folder = fetch("s3://b/m")
    before = identity("s3://b/m")
    s3.put("m/llm/model.safetensors", b"WEIGHTS")
    assert identity("s3://b/m") != before, "training would be skipped with the old weights"
    found, version = fetch_version("s3://b/m")
    assert found == folder and (folder / "llm/model.safetensors").read_bytes() == b"WEIGHTS"
    assert version == identity("s3://b/m") and s3.downloads()[3:] == ["m/llm/model.safetensors"]


def test_a_removed_object_leaves_the_cache(s3: Bucket) -> None:
    """An old shard beside a new single file would be read with it."""
    s3.put("m/llm/model-00001-of-00002.safetensors", b"old")
    s3.put("m/old/config.json", b"{}")
    folder = fetch("s3://b/m")
    del s3.objects["m/llm/model-00001-of-00002.safetensors"], s3.objects["m/old/config.json"]
    fetch("s3://b/m")
    assert sorted(_files(folder)) == ["config.json", "llm/merges.txt", "llm/model.safetensors"]
    assert not (folder / "old").exists()


def test_a_file_becomes_a_folder(s3: Bucket) -> None:
    """The other layout of the same model must fit into the place of the first."""
    s3.put("m/x.json", b"{}")
    fetch("s3://b/m")
    del s3.objects["m/x.json"]
    s3.put("m/x.json/y.json", b"[]")
    assert _files(fetch("s3://b/m"))["x.json/y.json"] == b"[]"


def test_two_stores_with_one_bucket_name(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The staging store's weights must not be taken for the production store's."""
    first = fetch("s3://b/m")
    other = Bucket()
    other.put("m/config.json", b"[]")
    with served(other):
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.endpoint)
        second = fetch("s3://b/m")
    assert first != second and _files(second) == {"config.json": b"[]"} and len(_files(first)) == 3


def test_a_file_of_the_cache_that_was_changed_is_fetched_again(s3: Bucket) -> None:
    """Bytes that somebody or a disk has changed, modification time and size put back."""
    path = fetch("s3://b/m") / "llm/model.safetensors"
    stat = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (fetch("s3://b/m") / "llm/model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("content", [b"", b"{", b'{"config.json": 1}', None])
def test_a_damaged_record_is_no_record(s3: Bucket, content: bytes | None) -> None:
    """What is not known of a file is not believed: everything comes anew."""
    folder = fetch("s3://b/m")
    record = folder.with_name(folder.name + ".json")
    record.unlink() if content is None else record.write_bytes(content)
    fetch("s3://b/m")
    assert len(s3.downloads()) == 6 and len(received.read(record)) == 3


@pytest.mark.parametrize(
    "fault",
    ["cut", "short", "long", "garbled", "silent", "reset", 500, 502, 429, (503, "SlowDown"), (200, "InternalError")],
)
@pytest.mark.parametrize("part_bytes", [0, 1 << 16], ids=["whole", "parts"])
def test_a_fault_that_passes_costs_a_try(s3: Bucket, fault: Any, part_bytes: int) -> None:
    """One dropped connection in a 16 GB download must not end the run, nor leave other bytes."""
    s3.put("m/llm/model.safetensors", BODY, part_bytes=part_bytes)
    s3.faults["GET m/llm/model.safetensors"] = [fault, fault]
    assert (fetch("s3://b/m") / "llm/model.safetensors").read_bytes() == BODY
    assert s3.downloads().count("m/llm/model.safetensors") == 3


@pytest.mark.parametrize("fault", ["cut", "short", "long", "garbled", "silent", "reset", 500, (503, "SlowDown")])
def test_a_fault_that_stays_names_the_object(s3: Bucket, tmp_path: Path, fault: Any) -> None:
    """Exit code 75: no verdict on the user's input, no tombstone; and no file that looks whole."""
    s3.put("m/llm/model.safetensors", BODY)
    s3.knows_ranges = False  # else what was cut off comes with the next try
    s3.faults["GET m/llm/model.safetensors"] = [fault, ...]
    with pytest.raises(Unreachable, match=r"^s3://b/m/llm/model\.safetensors: no success in 5 tries") as caught:
        fetch("s3://b/m")
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)
    assert s3.downloads().count("m/llm/model.safetensors") == 5
    assert not list(tmp_path.rglob("model.safetensors"))
    del s3.faults["GET m/llm/model.safetensors"]
    assert (fetch("s3://b/m") / "llm/model.safetensors").read_bytes() == BODY, "the same command goes on"


@pytest.mark.parametrize("fault", ["silent", "garbled", "reset", 500, (503, "SlowDown")])
def test_a_listing_is_asked_for_again(s3: Bucket, fault: Any) -> None:
    """The first request meets the same network as the others."""
    s3.faults["LIST m/"] = [fault, fault]
    assert len(identity("s3://b/m")) == 3
    s3.faults["LIST m/"] = [fault, ...]
    for ask in (fetch, identity):
        with pytest.raises(Unreachable, match=r"^s3://b/m: no success in 5 tries"):
            ask("s3://b/m")


def test_a_server_that_is_not_there(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection and a name service without an answer look alike from a machine that is cut off."""
    for endpoint in ("http://127.0.0.1:9", "http://nowhere.invalid:9"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(Unreachable, match=f"s3://b/m: no success.*{endpoint}"):
            fetch("s3://b/m")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (400, "ExpiredToken"),
        (403, "RequestTimeTooSkewed"),
        (404, "NoSuchBucket"),
    ],
)
def test_a_refusal_is_not_repeated(s3: Bucket, status: int, code: str) -> None:
    """Five tries at a wrong key lock accounts and cost time; the message says what to do."""
    s3.faults["LIST m/"] = [(status, code), ...]
    with pytest.raises(DataError, match=rf"s3://b/m: cannot be read from S3.*{code}.*\)\. [A-Z]"):
        fetch("s3://b/m")
    assert s3.asked == ["LIST m/"]


def test_no_credentials_and_no_endpoint(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the user's to set, and no traceback says so."""
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it remembers credentials
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(DataError, match="Set AWS_ACCESS_KEY_ID"):
        fetch("s3://b/m")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "store")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        fetch("s3://b/m")


def test_an_object_that_changes_on_the_way(s3: Bucket) -> None:
    """Half of the old and half of the new model is neither."""
    s3.put("m/llm/model.safetensors", BODY)

    def replace() -> str:
        s3.put("m/llm/model.safetensors", BODY[::-1])
        return "none"

    s3.faults["GET m/llm/model.safetensors"] = ["cut", replace]
    with pytest.raises(Unreachable, match=r"s3://b/m/llm/model\.safetensors: the object was replaced or removed"):
        fetch("s3://b/m")
    assert (fetch("s3://b/m") / "llm/model.safetensors").read_bytes() == BODY[::-1]
    s3.objects["m/config.json"].body = b"[]"  # a server that keeps no promise of ETags
    s3.put("m/new.json", b"1")
    s3.faults["HEAD m/new.json"] = [lambda: s3.objects.pop("m/new.json") and None]
    with pytest.raises(Unreachable, match="replaced or removed"):
        fetch("s3://b/m")


def test_what_was_left_by_a_kill_is_gone_on_with_but_not_believed(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 5 MiB need not come twice; other bytes in their place must not stay."""
    s3.put("m/llm/model.safetensors", BIG)
    monkeypatch.setattr(insist, "TRIES", 1)
    for spoil in (lambda path: None, lambda path: path.write_bytes(b"x" * path.stat().st_size)):
        s3.faults["GET m/llm/model.safetensors"] = ["cut"]
        with pytest.raises(Unreachable):
            fetch("s3://b/m")
        (left,) = (p for p in Path(os.environ["NVILA_CACHE"]).rglob("*.partial/*"))
        assert left.stat().st_size >= 4 * MIB and BIG.startswith(left.read_bytes())
        spoil(left)
        monkeypatch.setattr(insist, "TRIES", 2)
        folder = fetch("s3://b/m")
        assert (folder / "llm/model.safetensors").read_bytes() == BIG
        assert not list(folder.parent.rglob("*.partial"))
        (folder / "llm/model.safetensors").unlink()
        monkeypatch.setattr(insist, "TRIES", 1)


def _kms(body: bytes) -> dict[str, Any]:
    return {"etag": "a" * 32, "headers": {"x-amz-server-side-encryption": "aws:kms"}}


@pytest.mark.parametrize(
    "more",
    [
        lambda body: {"part_bytes": 4 * MIB},
        lambda body: {"part_bytes": 5 * MIB},
        lambda body: {"part_bytes": 16 * MIB},
        lambda body: _kms(body) | {"headers": _kms(body)["headers"] | sha256_header(body)},
        lambda body: {"etag": "name of this server", "headers": sha256_header(body)},
    ],
    ids=["parts", "parts-5", "one-part", "kms", "other"],
)
def test_every_kind_of_checksum_finds_a_changed_byte(s3: Bucket, more: Callable[[bytes], dict[str, Any]]) -> None:
    """Objects over 8 MiB came without any check."""
    s3.put("m/llm/model.safetensors", BIG, **more(BIG))
    s3.faults["GET m/llm/model.safetensors"] = ["garbled", ...]
    with pytest.raises(Unreachable, match=r"do not have the .* that the server names"):
        fetch("s3://b/m")
    del s3.faults["GET m/llm/model.safetensors"]
    assert (fetch("s3://b/m") / "llm/model.safetensors").read_bytes() == BIG


def test_where_nothing_can_be_compared_it_is_said(s3: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """An ETag under a key of a key service is no MD5: refusing it would refuse every such bucket."""
    s3.put("m/llm/model.safetensors", b"secret", **_kms(b"secret"))
    folder = fetch("s3://b/m")
    assert "s3://b/m/llm/model.safetensors: the server names no checksum" in capsys.readouterr().err
    record = received.read(folder.with_name(folder.name + ".json"))
    assert record["llm/model.safetensors"].sha256 == hashlib.sha256(b"secret").hexdigest()


def test_parts_of_a_server_that_does_not_tell_their_size(s3: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes that upload programs use are tried, so that such an object is compared too."""
    s3.tells_parts = False
    s3.put("m/llm/model.safetensors", BIG, part_bytes=8 * MIB)
    fetch("s3://b/m")
    assert "only the size" not in capsys.readouterr().err


def test_a_full_disk_is_named(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback does not say which disk is full, and it is no fault of the bucket."""

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("nvila.components.data.remote.s3object.sync", full)
    with pytest.raises(NvilaError, match=r"the cache cannot be written: No space left.*NVILA_CACHE") as caught:
        fetch("s3://b/m")
    assert caught.value.exit_code == 1


def test_an_empty_object(s3: Bucket) -> None:
    """A tokenizer's empty merges.txt is a file too."""
    s3.put("m/llm/merges.txt", b"")
    assert (fetch("s3://b/m") / "llm/merges.txt").read_bytes() == b""


def test_two_processes_share_one_download(s3: Bucket) -> None:
    """Two pods of a node would write one partial file, and fetch everything twice."""
    s3.put("m/llm/model.safetensors", BODY)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(fetch, ["s3://b/m", "s3://b/m/"]))
    assert folders[0] == folders[1] and len(s3.downloads()) == 3
    assert (folders[0] / "llm/model.safetensors").read_bytes() == BODY


def test_a_stop_is_not_taken_for_a_fault(s3: Bucket) -> None:
    """A step that is asked to stop while it downloads ends then, and not after five tries."""

    def stop() -> str:
        signal.raise_signal(signal.SIGUSR1)
        return "silent"

    def asked_to_stop(number: int, frame: object) -> None:
        raise Preempted("asked to stop")

    before = signal.signal(signal.SIGUSR1, asked_to_stop)
    try:
        s3.faults["GET m/config.json"] = [stop, ...]
        with pytest.raises(Preempted):
            fetch("s3://b/m")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert s3.downloads() == ["m/config.json"]


def test_a_cache_that_cannot_be_written_is_named(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is the first thing that is written, and a traceback would be the first that is seen."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "file"))
    with pytest.raises(NvilaError, match=r"file.*the cache cannot be written: Not a directory"):
        fetch("s3://b/m")
