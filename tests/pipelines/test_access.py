"""Where an API server is and the token that opens it, as people give them."""

from pathlib import Path

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError
from nvila.pipelines.kubeflow.access import api_url, token_of


@pytest.mark.parametrize(
    "host",
    ["", "kubeflow", "https://", "http://[::1", "http://h:x", "http://h:99999", "http://a b", "ftp://h",
     "https://ada:w0rd@h", "https://h/_/pipeline/?ns=ada"],
)  # fmt: skip
def test_a_host_that_is_none_is_named_without_its_password(host: str) -> None:
    """Some were `no answer` after five seconds, and a password stood in every message and in the run's address."""
    with pytest.raises(ConfigError, match="--host") as caught:
        api_url(host)
    assert "w0rd" not in str(caught.value)


def test_an_address_copied_from_the_browser_will_do() -> None:
    """What stands behind # never reaches a server; it was sent as a path."""
    assert (
        api_url("https://kubeflow.example:8443/pipeline/#/runs/details/r7") == "https://kubeflow.example:8443/pipeline"
    )


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"one\ntwo", b"\xff\xfe\x00"])
def test_a_file_without_a_token_is_named(tmp_path: Path, content: bytes) -> None:
    """Who has given --token-file was told to give it, or saw a traceback of the HTTP library."""
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--token-file: (holds no token|is no text)"):
        token_of(file, Environment())


def test_a_token_of_the_environment_may_end_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library's refusal of such a header said that the server's answer could not be read."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "ey.token\n")
    assert token_of(None, Environment.read()) == "ey.token"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "one\ntwo")
    with pytest.raises(ConfigError, match="KF_PIPELINES_TOKEN: holds no token"):
        token_of(None, Environment.read())
