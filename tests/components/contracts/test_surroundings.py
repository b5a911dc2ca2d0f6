"""What a machine withholds: a way round the proxy, room for the names of sockets, a home that can be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.surroundings import settle

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
MULTIPROCESSING = """
import os, sys
from multiprocessing.connection import Listener
from nvila.components.contracts.surroundings import settle
print(*settle(), sep="\\n", file=sys.stderr)
print(Listener(family="AF_UNIX").address)
print(*os.listdir(sys.argv[1]))
"""


@contextmanager
def answering(status: int, host: str = "127.0.0.1") -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = 10 if ":" in host else 2  # AF_INET6, AF_INET

    with Server((host, 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"{f'[{host}]' if ':' in host else host}:{server.server_port}"
        server.shutdown()


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process's own, put back afterwards."""
    before, found = dict(os.environ), tempfile.tempdir
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    if (link := Path(os.environ.get("TMPDIR", "/"))).is_symlink():
        link.unlink()
    os.environ.clear()
    os.environ.update(before)
    tempfile.tempdir = found


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "Http_Proxy", "all_proxy"])
@pytest.mark.parametrize("client", ["requests", "httpx"])
def test_only_other_machines_are_asked_through_the_proxy(
    variable: str, client: str, variables: pytest.MonkeyPatch
) -> None:
    """A company's proxy knows nothing of our 127.0.0.1: MLflow there seemed to be away for minutes."""
    get = pytest.importorskip(client).get
    with answering(403) as proxy, answering(200) as here, answering(200, "::1") as here6:
        variables.setenv(variable, f"http://{proxy}")
        variables.setenv("NO_PROXY", "other.example")
        settle()
        settle()
        assert os.environ["no_proxy"] == "other.example,127.0.0.1,localhost,::1"
        assert [get(f"http://{place}/").status_code for place in (here, here6)] == [200, 200]
        if (client, variable) != ("httpx", "Http_Proxy"):
            assert get("http://bucket.example/").status_code == 403


def test_a_step_has_the_variables_of_its_site(variables: pytest.MonkeyPatch) -> None:
    """A proxy that arrives as JSON only is obeyed by no library; and the API server is asked past it."""
    variables.setenv("NVILA_RUN_ID", "2b4c")
    variables.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    variables.setenv("KEPT", "the pod's own")
    given = {"environment": {"https_proxy": "http://proxy.example", "KEPT": "the site's"}}
    variables.setenv("NVILA_SITE", json.dumps(given))
    with entered(Environment.read()):
        assert os.environ["https_proxy"] == "http://proxy.example" and os.environ["KEPT"] == "the pod's own"
        assert os.environ["no_proxy"].endswith(",10.96.0.1")


def test_elsewhere_the_variables_of_steps_are_not_set(variables: pytest.MonkeyPatch) -> None:
    """A training pod has its own; a file that is named there need not be in it."""
    variables.setenv("NVILA_SITE", json.dumps({"environment": {"CURL_CA_BUNDLE": "/none"}}))
    variables.delenv("CURL_CA_BUNDLE", raising=False)
    with entered(Environment.read()):
        assert "CURL_CA_BUNDLE" not in os.environ


def test_children_read_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """vLLM could not import torch where the locale was ASCII: files of libraries have letters of all kinds."""
    code = (
        "import subprocess, sys; from nvila.components.contracts.environment import Environment, entered, for_child\n"
        "with entered(Environment()):\n"
        "    subprocess.run([sys.executable, '-c', 'print(open(0).read())'], env=for_child(), check=True, "
        "input=b't\\xc3\\xa4st')"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_only, capture_output=True, check=False)
    assert done.stdout.decode().strip() == "täst", done.stderr.decode()


def test_without_a_proxy_nothing_is_set(variables: pytest.MonkeyPatch) -> None:
    """A variable that nobody asked for would be handed on to every child."""
    settle()
    assert "no_proxy" not in os.environ
    variables.setenv("http_proxy", "http://127.0.0.1:9")
    variables.setenv("no_proxy", "*")
    settle()
    assert os.environ["no_proxy"] == "*"


@pytest.mark.parametrize("name", ["x" * 100, "with:colon"])
def test_a_long_folder_for_temporary_files_has_room_for_sockets(name: str, tmp_path: Path) -> None:
    """A socket's name has 107 bytes: training waited for a loader that could not listen. Files still lie there."""
    folder = tmp_path / name
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MULTIPROCESSING, str(folder)],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    address, there = done.stdout.splitlines()
    link = Path(address).parents[1]
    assert len(address) <= 107 and there == Path(address).parent.name and not done.stderr.strip()
    assert link.readlink() == folder
    link.unlink()


def test_a_folder_for_temporary_files_that_is_none_is_told(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python passes over it in silence; gigabytes would go to a small /tmp."""
    variables.setenv("TMPDIR", str(tmp_path / "none"))
    (line,) = settle()
    assert line.startswith(f"TMPDIR: {tmp_path / 'none'} cannot be written; temporary files lie in ")
    assert settle() == []


def test_without_any_place_for_temporary_files_the_variable_is_named(
    variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Libraries fail one after the other, each in its own words."""
    variables.setenv("TMPDIR", "/proc")
    variables.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(ConfigError, match=r"^TMPDIR: temporary files cannot be written anywhere"):
        settle()


def test_caches_lie_where_they_can_be_written(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pod's user has a number, and no home: matplotlib's own way out was gone with the first step that ended."""
    home = tmp_path / "file"
    home.write_text("")
    variables.setenv("HOME", str(home))
    variables.setenv("TMPDIR", str(tmp_path))
    variables.delenv("XDG_CACHE_HOME", raising=False)
    (line,) = settle()
    caches = Path(os.environ["XDG_CACHE_HOME"])
    assert caches.resolve().parent == tmp_path and caches.is_dir() and "cannot be written" in line
    assert Path(os.environ["MPLCONFIGDIR"]).parent == caches
    assert settle() == [], "children are told nothing again"


def test_libraries_do_not_tell_of_what_nobody_asked_for() -> None:
    """Each step's log began with four lines about kernels that were not to be used."""
    code = """
from nvila.components.contracts.surroundings import settle
settle()
from transformers import Qwen2ForCausalLM
import sys
assert "torchao" in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
