"""What is to be served and what is: two small records in `<runs folder>/serving/`, each with one writer.

`wanted.json` is written, by rename and under `exclusive`, by whoever decides: `nvila serve`, `nvila stop`, a rollout.
`status.json` is written by the supervisor alone, which makes true what is wanted. A third, `decision.json`, keeps what
the last rollout decided.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from nvila.components.contracts import locks
from nvila.components.contracts.environment import for_child, name_of, named
from nvila.components.contracts.errors import DamagedError, RolloutError
from nvila.components.contracts.files import discard, read_json, write_atomic
from nvila.components.contracts.manifest import written_by
from nvila.components.contracts.processes import Process, birth
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.serve import ports, server
from nvila.components.serve.interpreter import serve_python
from nvila.components.serve.programs import Program, end_all

Role = Literal["champion", "challenger"]
State = Literal["starting", "ready", "waiting", "draining"]
"""Of one version's server: loading; answering; between an end and the next start; its last requests are answered."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Version(_Record):
    """A version of a model."""

    name: str
    """Of the model: what requests call it, and the registry."""
    version: str
    digest: str
    """Of the model's manifest."""
    model_dir: str
    """Its serving folder."""
    settings: EndpointSettings = EndpointSettings()
    """How it is served: another limit is another server."""


class Wanted(_Record):
    """What is to be served."""

    generation: int
    """One more with each change, so that a status tells which one it is of."""
    host: str
    port: int = Field(ge=1, le=65_535)
    key: str | None = None
    """Salted scrypt of the key that the endpoint asks for, as `fingerprint` makes it; None leaves it open. The key
    itself is in the memory of the supervisor only."""
    champion: Version | None = None
    """None while the first version is tried."""
    challenger: Version | None = None
    """The version that is tried beside it."""
    weight: int = Field(default=0, ge=0, le=100)
    """Per cent of the requests that the challenger gets."""
    replaced: Version | None = None
    """The champion that was stopped to make room for the challenger; it comes back where that is dropped."""
    tried_by: Process | None = None
    """Who tries the challenger: it is dropped where that process is gone. None: nobody does."""
    fallback: str | None = None
    """`host:port` of the endpoint that is asked what the only server of this one fails to answer; of a pod."""
    stopped: bool = False
    """Everything is to end."""

    @property
    def settings(self) -> EndpointSettings:
        """Those of the version that users reach, which Envoy keeps to."""
        shown = self.champion or self.challenger
        return shown.settings if shown else EndpointSettings()


class VersionStatus(Program):
    """One version's server; `pid` is of the process that ends it."""

    version: Version
    role: Role
    state: State
    url: str
    """Its own base URL on this machine, without Envoy; it asks for the same key."""
    since: float
    """When it got into this state, in seconds since the epoch."""
    restarts: int = 0
    """How often it ended by itself."""
    ended: str = ""
    """How it did so the last time, with the last lines of its log."""
    log: str


class Status(_Record):
    """What the supervisor has made of it."""

    generation: int
    """The `wanted` that all else here is of: its servers were started, and Envoy sends them what their states allow."""
    supervisor: Process
    key: str | None = None
    """`fingerprint` of the key that it has in memory."""
    url: str
    """What users are given, without `/v1`."""
    admin: str
    """Base URL, or path of the socket, of Envoy's admin interface."""
    envoy: Program | None = None
    envoy_restarts: int = 0
    since: float
    """When the endpoint first answered, in seconds since the epoch; 0 before."""
    restarts: int = 0
    """How often the supervisor itself was taken over from a dead one."""
    versions: list[VersionStatus] = []
    trouble: str = ""
    """Why it cannot do what is wanted, where it cannot."""

    def of(self, role: Role) -> VersionStatus | None:
        """The server that has this role, if one has."""
        return next((one for one in self.versions if one.role == role and one.state != "draining"), None)

    @property
    def programs(self) -> list[Program]:
        """All that was started."""
        return [*([self.envoy] if self.envoy else []), *self.versions]


class Decision(_Record):
    """What a rollout decided last."""

    at: float
    """In seconds since the epoch."""
    version: Version
    decision: Literal["promoted", "rolled back"]
    reasons: list[str]


class Guards(_Record):
    """The supervisor and the process that stands by: while one of them lives, so do the programs."""

    guards: list[tuple[int, float]] = []
    """Process ids with `birth`."""

    @property
    def alive(self) -> bool:
        """Whether one of them runs."""
        return any(birth(pid) == born for pid, born in self.guards)


R = TypeVar("R", bound=_Record)

SERVING = "serving"
START_SECONDS = 60.0
"""How long the supervisor itself may take to start."""
STOP_SECONDS = 60.0
"""How long it may take to end all: last answers, then the servers."""


def place(runs: Path, record: type[_Record]) -> Path:
    """Where a record lies."""
    return runs / SERVING / f"{record.__name__.lower()}.json"


def read(runs: Path, record: type[R]) -> R | None:
    """The record; None where there is none, or it is torn or of another form, which is said."""
    try:
        return record.model_validate(read_json(place(runs, record)))
    except ValidationError:
        return None


def write(runs: Path, record: _Record) -> None:
    """Keep a record."""
    write_atomic(place(runs, type(record)), record.model_dump_json(indent=1) + "\n")


@contextmanager
def exclusive(runs: Path) -> Iterator[None]:
    """Only one process at a time decides what is served from a runs folder."""
    folder = runs / SERVING
    folder.mkdir(parents=True, exist_ok=True)
    with locks.alone(folder / ".lock", f"{folder}: another process starts or stops a server"):
        yield


@contextmanager
def rolling(runs: Path) -> Iterator[None]:
    """Only one rollout at a time. `nvila stop` does not wait for it."""
    folder = runs / SERVING
    folder.mkdir(parents=True, exist_ok=True)
    with locks.alone(folder / ".rollout.lock", f"{folder}: another rollout is under way", locks.WORK_SECONDS):
        yield


def why_not(runs: Path, host: str, port: int) -> str | None:
    """Why the endpoint cannot listen there, in words; None where it can, or does so already."""
    wanted = read(runs, Wanted) if running(runs) else None
    return None if wanted and (wanted.host, wanted.port) == (host, port) else ports.why_not(host, port)


def require_address(runs: Path, host: str, port: int) -> None:
    """Raises:
    PreflightError: the endpoint cannot listen there: the port is taken by another program, say.
    """
    if why_not(runs, host, port):
        server.require_address(host, port)


def require_files(version: Version) -> None:
    """Read the files of a serving folder, every time.

    Raises:
        DamagedError: they are not what the step wrote, or are those of another model than is wanted.
    """
    made = written_by(Path(version.model_dir))
    if made is not None and made.digest != version.digest:
        raise DamagedError(
            f"the folder of {version.name} version {version.version} holds another model",
            where=version.model_dir,
            value={"wanted": version.digest[:12], "there": made.digest[:12]},
            do="Run the recipe again, or serve the folder by its path.",
        )


def change(runs: Path, **fields: object) -> Wanted:
    """Write what is wanted anew, with these fields and the next generation. The caller holds `exclusive`.

    Where nothing was wanted, or all was to end, nothing of that is left: `host` and `port` must be given.
    """
    before = read(runs, Wanted)
    kept = {} if before is None or before.stopped else dict(before)
    generation = before.generation + 1 if before else 1
    wanted = Wanted.model_validate({**kept, **fields, "generation": generation})
    write(runs, wanted)
    return wanted


def fingerprint(key: SecretStr | None) -> str | None:
    """Salted scrypt of a key, to be known again by `matches` and to be guessed by nobody."""
    if key is None:
        return None
    salt = os.urandom(16)
    return f"{salt.hex()}:{_scrypt(key, salt)}"


def matches(known: str | None, key: SecretStr | None) -> bool:
    """Whether a fingerprint is that of this key, or both are none."""
    if known is None or key is None:
        return known is None and key is None
    salt, _, digest = known.partition(":")
    try:
        return hmac.compare_digest(_scrypt(key, bytes.fromhex(salt)), digest)
    except ValueError:
        return False


def _scrypt(key: SecretStr, salt: bytes) -> str:
    return hashlib.scrypt(key.get_secret_value().encode(), salt=salt, n=2**14, r=8, p=1, dklen=32).hex()


def running(runs: Path) -> Status | None:
    """What is being served, while there is a supervisor; None where nobody looks after anything."""
    guards, status = read(runs, Guards), read(runs, Status)
    return status if guards and guards.alive else None


def ensure_supervisor(runs: Path, key: SecretStr | None) -> None:
    """Have a supervisor that knows this key look after `wanted.json`, which the caller has written under `exclusive`.

    One that knows another key is ended with all its servers first, and so is what a dead one has left.

    Raises:
        PreflightError: there is no serving environment.
        RolloutError: it did not start.
    """
    if (status := running(runs)) is not None:
        if matches(status.key, key):
            return
        _end_supervisor(runs)
    end_leftovers(runs)
    log = runs / SERVING / "supervisor.log"
    variables = named(serve_python=serve_python()) | (named(api_key=key.get_secret_value()) if key is not None else {})
    with log.open("ab") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "nvila.components.serve.supervisor", str(runs)],
            env=for_child(variables, without=(name_of("api_key"), name_of("progress_file"))),
            start_new_session=True,
            cwd=runs,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    deadline = time.monotonic() + START_SECONDS
    while running(runs) is None:
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            raise RolloutError(f"the supervisor did not start: {tail(log)}", where=str(log))
        time.sleep(0.05)


def wait_for(
    runs: Path,
    generation: int,
    condition: Callable[[Status], bool],
    deadline_seconds: float,
    tell: Callable[[Status | None], None] = lambda status: None,
) -> Status:
    """Wait until what is served is of this generation, or a later one, and as `condition` asks.

    Args:
        runs: the runs folder.
        generation: as `change` returned it.
        condition: asked again and again; what it raises ends the wait.
        deadline_seconds: how long.
        tell: given what is known, several times a second.

    Raises:
        RolloutError: the deadline passed, there is no supervisor, or it cannot do what is wanted.
    """
    began, troubled = time.monotonic(), None
    while True:
        status = running(runs)
        tell(status)
        if status and status.generation >= generation and condition(status):
            return status
        now = time.monotonic()
        troubled = (troubled or now) if status is None or status.trouble else None
        if now - began > deadline_seconds or (troubled and now - troubled > TROUBLE_SECONDS):
            break
        time.sleep(0.1)
    log = runs / SERVING / "supervisor.log"
    if status is None:
        raise RolloutError(f"the supervisor has ended: {tail(log)}", where=str(log))
    raise RolloutError(
        status.trouble or f"the endpoint was not as asked within {deadline_seconds:.0f} seconds", where=str(log)
    )


TROUBLE_SECONDS = 5.0
"""How long a supervisor may be without success, or be taken over, before a wait gives up."""


def end(runs: Path) -> list[str]:
    """End everything that is served from a runs folder, and what is left of servers of before; returns what that was.

    The caller holds `exclusive`.
    """
    status = running(runs)
    ended = [_words(one, status) for one in status.versions] if status else []
    if status:
        change(runs, host="127.0.0.1", port=status_port(status), stopped=True, champion=None, challenger=None)
        _end_supervisor(runs)
    ended += end_leftovers(runs)
    for record in (Wanted, Status, Guards):
        discard(place(runs, record))
    return ended


def leftovers(runs: Path) -> list[str]:
    """What still runs of a supervisor that is gone."""
    status, here = read(runs, Status), Process.this()
    if status is None or running(runs) or (status.supervisor.host, status.supervisor.boot) != (here.host, here.boot):
        return []
    return [_left(one, status) for one in status.programs if not one.gone]


def end_leftovers(runs: Path) -> list[str]:
    """End what is left of a supervisor that is gone, and servers that earlier versions of this program have started."""
    ended = _end_earlier(runs)
    status = read(runs, Status)
    if status is None or running(runs):
        return ended
    left = end_all(status.programs, status.supervisor, STOP_SECONDS)
    discard(place(runs, Status))
    return ended + [_left(one, status) for one in left]


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:]).strip()
    except OSError:
        return "no log"


def status_port(status: Status) -> int:
    """The port that users are given."""
    return int(status.url.rpartition(":")[2])


def _words(one: VersionStatus, status: Status) -> str:
    return f"{one.version.name} version {one.version.version} at {status.url}"


def _left(one: Program, status: Status) -> str:
    return f"left of a dead supervisor: {_words(one, status) if isinstance(one, VersionStatus) else 'Envoy'}"


def _end_supervisor(runs: Path) -> None:
    """Tell it to end, with its servers; where it does not, they end by themselves once it is killed."""
    guards = read(runs, Guards) or Guards()
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        for pid, born in guards.guards:
            if birth(pid) == born:
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while guards.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        if not guards.alive:
            return


def _end_earlier(runs: Path) -> list[str]:
    """Earlier versions kept one server's process in `endpoint.json` and one that was tried in `challenger.json`."""
    import psutil

    ended = []
    for name in ("endpoint", "challenger"):
        old = runs / SERVING / f"{name}.json"
        record = read_json(old)
        pid, born = record.get("pid"), record.get("born")
        since_boot = birth(pid) if isinstance(pid, int) and pid > 1 else None
        if since_boot and born in (since_boot, psutil.Process(pid).create_time()):  # the second in records of old
            server.stop(int(str(pid)))
            ended.append(f"{record.get('model')} version {record.get('version')} at {record.get('url')}")
        discard(old)
    return ended
