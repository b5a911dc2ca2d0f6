"""Makes true what `wanted.json` says: one Envoy, a server per version, and never more than that for long.

One loop looks at what is wanted and at what is, several times a second, and does what is missing: starts, restarts
after a longer and longer wait, drains, ends. It decides nothing about versions. Killed, it is taken over by the process
that stands by, with the servers as they are; where both are killed, everything ends (`contracts.children.leashed`).

    python -m nvila.components.serve.supervisor RUNS
"""

from __future__ import annotations

import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts import locks
from nvila.components.contracts.addresses import http_url
from nvila.components.contracts.children import leashed
from nvila.components.contracts.environment import Environment, entered, for_child
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.files import discard
from nvila.components.contracts.processes import Process, birth
from nvila.components.serve import deployment, envoy, interpreter, ports, server
from nvila.components.serve.deployment import Guards, Role, State, Status, Version, VersionStatus, Wanted
from nvila.components.serve.exporter import Exporter
from nvila.components.serve.programs import Program, reap
from nvila.components.serve.routes import Ways

TICK_SECONDS = 0.25
ROUND_SECONDS = 60.0
"""Most that one round of the loop may take; an Envoy that does not answer takes half of that."""
SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 60.0
"""Wait before a server that has ended starts again: twice as long each time."""
STABLE_SECONDS = 60.0
"""A server that was ready for so long has not failed before."""
HANG_SECONDS = 30.0
"""Without an answer to `/health` for so long, a server that was ready is ended."""
DRAIN_SECONDS = 120.0
"""Most that last answers of a server that nobody wants any more may take."""
END_SECONDS = 20.0
"""The same where everything ends, and people wait for that: in a pod nobody does."""
GRACE_SECONDS = 12.0
"""How long a server may take to end: a little more than the process between gives it."""
LOG_BYTES = 8 * 2**20
"""Of a log; a longer one becomes the one before, and begins anew."""


@dataclass
class _Server:
    """One version's server over all its starts."""

    version: Version
    role: Role
    log: Path
    state: State = "waiting"
    since: float = field(default_factory=time.time)
    program: Program | None = None
    url: str = ""
    restarts: int = 0
    ended: str = ""
    failures: int = 0
    """In a row."""
    hung: str = ""
    """Why it is being ended."""
    due: float = 0.0
    """When it is started, as of `time.monotonic`; when it began to drain, while it does."""
    health: _Health | None = None
    ending: threading.Thread | None = None
    reading: _Reading | None = None

    def becomes(self, state: State) -> None:
        """Note a new state."""
        if state != self.state:
            _say(f"{self.version.name} version {self.version.version} ({self.role}): {state}")
            self.state, self.since = state, time.time()

    @property
    def takes_requests(self) -> bool:
        """Whether Envoy may send it any."""
        return self.state == "ready" and self.ending is None

    def end(self, grace_seconds: float) -> None:
        """Begin to end its program."""
        if self.ending is None and self.program:
            self.ending = threading.Thread(target=self.program.end, args=(grace_seconds,), daemon=True)
            self.ending.start()

    def status(self) -> VersionStatus:
        """For the record."""
        program = self.program or Program(pid=0, born=0.0)
        known = {name: getattr(self, name) for name in _TOLD}
        return VersionStatus(**program.model_dump(), **known, log=str(self.log))


_TOLD = ("version", "role", "state", "url", "since", "restarts", "ended")


class _Reading(threading.Thread):
    """Reads a version's files before each start, which takes a while."""

    def __init__(self, version: Version) -> None:
        super().__init__(daemon=True)
        self.fault: Exception | None = None
        self._version = version
        self.start()

    def run(self) -> None:
        try:
            deployment.require_files(self._version)
        except (NvilaError, OSError) as error:
            self.fault = error


class _Health(threading.Thread):
    """Asks a server how it is, so that nobody else has to wait for one that hangs."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.answered: float | None = None
        self._url, self._done = url, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.2 if self.answered is None else 2.0):
            if server.is_ready(self._url):
                self.answered = time.monotonic()

    def stop(self) -> None:
        self._done.set()


class Supervisor:
    """Of one folder of runs."""

    def __init__(self, runs: Path, here: Environment, *, alone: bool = False) -> None:
        """Take over what another one has left.

        Args:
            runs: the folder.
            here: the environment, for the key.
            alone: nobody stands by (in a pod, where somebody else starts it again).
        """
        self._runs, self._key, self._alone = runs, here.api_key, alone
        self._folder = runs / deployment.SERVING
        self._wanted: Wanted | None = None
        self._servers: list[_Server] = []
        self._ended: dict[str, float] = {}
        """When each `address:port` of Envoy's lost its server, for as long as a request may still go that way."""
        self._guards: list[tuple[int, float]] = []
        self._standby: Program | None = None
        self._envoy: Program | None = None
        self._place = Path()
        self._binary = interpreter.envoy()
        self._applied: dict[str, Any] = {}
        self._begun, self._asked = 0.0, time.monotonic()
        self._restarts, self._envoy_restarts, self._since, self._generation = 0, 0, 0.0, 0
        self._trouble = ""
        self._written: Status | None = None
        self._print = deployment.fingerprint(self._key)
        self._known: tuple[str | None, bool] | None = None
        self._told = threading.Event()
        self._looked = time.monotonic()
        self._take_over()

    def run(self) -> None:
        """Until nothing is wanted any more, or a signal comes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._told.set())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._guard()
        while not self._told.is_set():
            self._looked = time.monotonic()
            reap()
            self._wanted = deployment.read(self._runs, Wanted) or self._wanted
            if not self._roles():
                break
            try:
                self._step()
            except (OSError, NvilaError) as error:
                self._troubled(str(error))
            self._record()
            self._told.wait(TICK_SECONDS)
        self._end()

    @property
    def goes_round(self) -> bool:
        """Whether its loop has looked lately."""
        return time.monotonic() - self._looked < ROUND_SECONDS

    def _roles(self) -> dict[Role, Version]:
        """Which versions are to have a server. A challenger whose rollout was killed is none."""
        wanted = self._wanted
        if wanted is None or wanted.stopped:
            return {}
        given_up = wanted.tried_by is not None and wanted.tried_by.alive is False
        champion = wanted.champion or (wanted.replaced if given_up else None)
        found: dict[Role, Version | None] = {
            "champion": champion,
            "challenger": None if given_up or wanted.challenger == champion else wanted.challenger,
        }
        return {role: version for role, version in found.items() if version}

    def _step(self) -> None:
        """One look, and what it asks for."""
        assert self._wanted
        wanted, trouble = self._wanted, ""
        self._guard()
        if not self._fits(wanted.key):
            trouble = (
                "the endpoint is to have another key than this supervisor knows; `nvila serve` starts it with that"
            )
        self._assign()
        for one in list(self._servers):
            self._look_after(one)
        trouble = self._look_after_envoy(wanted) or trouble
        self._troubled(trouble)
        if not trouble:
            self._generation = wanted.generation
            if not self._since and any(one.takes_requests and one.role == "champion" for one in self._servers):
                self._since = time.time()

    def _fits(self, known: str | None) -> bool:
        """Whether the key is the one that is wanted. Finding out takes long on purpose, and is done once."""
        if self._known is None or self._known[0] != known:
            self._known = known, deployment.matches(known, self._key)
        return self._known[1]

    def _assign(self) -> None:
        """Give the servers their roles; those without one are drained, those that are missing are to be started."""
        roles = self._roles()
        for one in self._servers:
            role = next((r for r, v in roles.items() if v == one.version), None)
            if role is None:
                if one.state != "draining":
                    one.due = time.monotonic()
                    one.becomes("draining")
            elif one.ending is None:
                del roles[role]
                one.role = role
                if one.state == "draining":
                    one.becomes("starting" if one.program else "waiting")
        for role, version in roles.items():
            log = self._folder / f"{version.name}-v{version.version}.log"
            self._servers.append(_Server(version, role, log))

    def _look_after(self, one: _Server) -> None:
        now = time.monotonic()
        if one.ending is not None:
            if one.ending.is_alive():
                return
            one.ending = None
        if one.program is not None:
            one.program = one.program.seen()
            if not one.program.alive:
                self._has_ended(one)
        if one.state == "draining":
            if one.program is None:
                self._servers.remove(one)
            elif self._drained(one, now - one.due):
                one.end(GRACE_SECONDS)
        elif one.program is None:
            busy = any(other.state == "draining" for other in self._servers) and not one.restarts
            if now >= one.due and not busy:  # memory may not hold both
                self._start(one)
        elif one.health and one.health.answered is not None:
            silent = now - one.health.answered
            if one.state == "starting":
                one.becomes("ready")
            elif silent > HANG_SECONDS:
                one.hung = f"it did not answer for {silent:.0f} seconds"
                one.end(GRACE_SECONDS)
            elif time.time() - one.since > STABLE_SECONDS:
                one.failures = 0

    def _start(self, one: _Server) -> None:
        if one.reading is None:
            one.reading = _Reading(one.version)
        one.reading.join(TICK_SECONDS)
        if one.reading.is_alive():
            return
        fault, one.reading = one.reading.fault, None
        if fault:
            return self._failed(one, str(fault))
        port = ports.free_port("127.0.0.1")
        _cut(one.log)
        key = None if self._key is None else self._key.get_secret_value()  # an empty key is one
        try:
            started = server.start(
                Path(one.version.model_dir),
                port=port,
                served_name=one.version.name,
                log_path=one.log,
                api_key=key,
                settings=one.version.settings,
                heirs=deployment.place(self._runs, Guards),
            )
        except (NvilaError, OSError) as error:
            return self._failed(one, str(error))
        one.program, one.url = Program(pid=started.pid, born=birth(started.pid) or 0.0), started.url
        one.health = _Health(one.url)
        one.becomes("starting")

    def _has_ended(self, one: _Server) -> None:
        assert one.program
        one.program.end(0)  # where the process between was killed, what it would have ended
        one.program = None
        self._ended[envoy.server_of(one.url)] = time.monotonic()
        if one.health:
            one.health.stop()
        if one.state != "draining":
            self._failed(one, one.hung or deployment.tail(one.log))
            one.hung = ""

    def _failed(self, one: _Server, why: str) -> None:
        one.ended, one.restarts = why, one.restarts + 1
        wait = min(SHORTEST_SECONDS * 2**one.failures, LONGEST_SECONDS)
        one.failures += 1
        one.due = time.monotonic() + wait
        _say(f"{one.version.name} version {one.version.version} ended, next start in {wait:.0f} s: {why}")
        one.state = "starting"
        one.becomes("waiting")

    def _drained(self, one: _Server, seconds: float) -> bool:
        """Whether its last answers have been given, or have had their time."""
        if seconds > self._longest() or not self._applied:
            return True
        if envoy.server_of(one.url) in repr(self._applied["routes.json"]).replace("'", " ").split():
            return False  # Envoy still sends it requests
        with suppress(OSError):
            admin = envoy.Admin(str(self._place / "admin"))
            counted = admin.counters()
            mine = counted.get(envoy.server_of(one.url), envoy.Counters())
            # A request that is still being received may be on its way there.
            return mine.active == 0 and admin.receiving(counted) == 0
        return False

    def _longest(self) -> float:
        """How long last answers may take, in seconds."""
        return min(DRAIN_SECONDS, self._wanted.settings.request_seconds) if self._wanted else 0.0

    def _look_after_envoy(self, wanted: Wanted) -> str:
        """Have Envoy run and do as it should; what is in the way of that."""
        now = time.monotonic()
        if self._envoy is not None:
            self._envoy = self._envoy.seen()
            if not self._envoy.alive:
                self._end_envoy()
                self._envoy_restarts += 1
        if not self._place.name or not self._place.is_dir():
            self._place = Path(tempfile.mkdtemp(prefix="nvila-envoy-"))
        contents = self._contents(wanted)
        if self._envoy and self._applied and self._applied["bootstrap.json"] != contents["bootstrap.json"]:
            self._end_envoy()
        envoy.link_certificate(self._place, wanted.settings)
        if self._envoy is None:
            if self._begun and now - self._begun < SHORTEST_SECONDS:
                return f"Envoy has ended: {deployment.tail(self._folder / 'envoy.log', 3)}"
            if why := ports.why_not(wanted.host, wanted.port):
                return f"{wanted.host}:{wanted.port}: nothing of ours can listen there ({why})"
            envoy.apply(self._place, contents, None)
            (self._place / "admin").unlink(missing_ok=True)
            with (self._folder / "envoy.log").open("ab") as log:
                child = leashed(
                    envoy.arguments(self._binary, self._place),
                    heirs=deployment.place(self._runs, Guards),
                    env=for_child(only=("PATH", "TMPDIR")),
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                )
            self._envoy = Program(pid=child.pid, born=birth(child.pid) or 0.0)
            self._asked = self._begun = now
            _say("Envoy started")
        if self._applied == contents:
            return ""
        try:
            if envoy.apply(self._place, contents, envoy.Admin(str(self._place / "admin"))):
                self._applied, self._asked = contents, now
                return ""
            return f"Envoy did not take its configuration: {deployment.tail(self._folder / 'envoy.log', 3)}"
        except OSError as error:
            if now - self._asked > HANG_SECONDS:
                self._end_envoy()
                self._asked = now
            return f"Envoy does not answer: {error}"

    def _contents(self, wanted: Wanted) -> dict[str, Any]:
        family = socket.AF_INET6 if ":" in wanted.host else socket.AF_INET
        address = str(socket.getaddrinfo(wanted.host, wanted.port, family, socket.SOCK_STREAM)[0][4][0])
        now = time.monotonic()
        self._ended = {place: at for place, at in self._ended.items() if now - at < envoy.HELD_SECONDS}
        taking = {one.role: envoy.server_of(one.url) for one in self._servers if one.takes_requests}
        roles = self._roles()
        # Before it gets a share of the requests, a challenger is nobody's to ask for. Where two versions have one
        # number, as two folders have, it means the champion.
        asked = [role for role in ("challenger", "champion") if role in roles and (wanted.weight or role == "champion")]
        ways = Ways(
            taking.get("champion"),
            taking.get("challenger"),
            wanted.weight,
            {roles[role].version: taking.get(role) for role in asked},
            wanted.fallback,
        )
        return envoy.files(
            self._place,
            address,
            wanted.port,
            wanted.settings,
            [*(envoy.server_of(one.url) for one in self._servers if one.program), *self._ended],
            ways,
            envoy.GATEWAY_IDLE_SECONDS if wanted.fallback else envoy.IDLE_SECONDS,
        )

    def _end_envoy(self) -> None:
        if self._envoy:
            _say("Envoy ended")
            self._envoy.end(GRACE_SECONDS)
        self._envoy, self._applied = None, {}

    def _troubled(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            _say(trouble)
        self._trouble = trouble

    def _guard(self) -> None:
        """Have somebody stand by, and all that was started know whom it goes on with."""
        if self._guards and (self._alone or (self._standby and self._standby.alive)):
            return
        this = Process.this()
        self._guards = [(this.pid, this.born)]
        if not self._alone:
            command = [sys.executable, "-IS", str(Path(__file__).with_name("standby.py")), str(this.pid)]
            child = subprocess.Popen([*command, str(self._runs)], start_new_session=True, stdin=subprocess.DEVNULL)
            self._standby = Program(pid=child.pid, born=birth(child.pid) or 0.0, session=child.pid)
            self._guards.append((self._standby.pid, self._standby.born))
        deployment.write(self._runs, Guards(guards=self._guards))

    def _take_over(self) -> None:
        """Go on with what another supervisor has started, where it still runs."""
        before = deployment.read(self._runs, Status)
        here = Process.this()
        if before is None or (before.supervisor.host, before.supervisor.boot) != (here.host, here.boot):
            return
        _say("taking over from a supervisor that was killed")
        self._restarts, self._envoy_restarts, self._since = before.restarts + 1, before.envoy_restarts, before.since
        self._generation = before.generation
        if before.envoy and before.envoy.alive:
            self._envoy, self._place = before.envoy, Path(before.admin).parent
        elif before.envoy:
            before.envoy.end(0)
        for known in before.versions:
            one = _Server(known.version, known.role, Path(known.log))
            one.restarts, one.ended, one.since, one.url = known.restarts, known.ended, known.since, known.url
            program = Program(**known.model_dump(include=set(Program.model_fields)))
            if known.pid and program.alive:
                one.program, one.health = program, _Health(known.url)
                one.state = "starting" if known.state == "ready" else known.state
                one.due = time.monotonic()
            elif known.pid:
                program.end(0)
            self._servers.append(one)

    def _record(self) -> None:
        """Write the status, where it is another one."""
        assert self._wanted
        status = Status(
            generation=self._generation,
            supervisor=self._written.supervisor if self._written else Process.this(),
            key=self._print,
            url=self._url(self._wanted),
            admin=str(self._place / "admin"),
            envoy=self._envoy,
            envoy_restarts=self._envoy_restarts,
            since=self._since,
            restarts=self._restarts,
            versions=[one.status() for one in self._servers],
            trouble=self._trouble,
        )
        if status != self._written:
            deployment.write(self._runs, status)
            self._written = status
        for log in (self._folder / "supervisor.log", self._folder / "envoy.log", *(one.log for one in self._servers)):
            _cut(log, LOG_BYTES)

    def _url(self, wanted: Wanted) -> str:
        url = http_url(wanted.host, wanted.port)
        return url.replace("http:", "https:", 1) if wanted.settings.certificate else url

    def _end(self) -> None:
        """Give the last answers, then end everything."""
        _say("ending")
        if self._standby:
            self._standby.end(0)
        admin = envoy.Admin(str(self._place / "admin"))
        seconds = self._longest() if self._alone else END_SECONDS
        deadline = time.monotonic() + seconds
        with suppress(OSError):
            admin.post("/healthcheck/fail")
            admin.post("/drain_listeners")
            while time.monotonic() < deadline and _busy(admin):
                self._looked = time.monotonic()
                time.sleep(TICK_SECONDS)
        programs = [one.program for one in self._servers if one.program] + ([self._envoy] if self._envoy else [])
        threads = [threading.Thread(target=program.end, args=(GRACE_SECONDS,)) for program in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._place.name:
            shutil.rmtree(self._place, ignore_errors=True)
        for record in (Status, Guards, *([Wanted] if not self._roles() else [])):
            discard(deployment.place(self._runs, record))  # type: ignore[arg-type]
        _say("ended")


def _busy(admin: envoy.Admin) -> bool:
    """Whether a server has a request, or one is being received."""
    counted = admin.counters()
    return any(one.active for one in counted.values()) or admin.receiving(counted) > 0


def _cut(log: Path, most: int = LOG_BYTES) -> None:
    """Move what a log says to `NAME.1` where it has more bytes: who writes it goes on writing to its new beginning."""
    with suppress(OSError):
        if log.stat().st_size > most:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            with log.open("r+b") as file:
                file.truncate(0)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def supervise(runs: Path, *, alone: bool = False, metrics: tuple[str, int] | None = None) -> None:
    """Look after what is wanted in a folder of runs until nothing is, or a signal comes.

    Args:
        runs: the folder.
        alone: nobody stands by.
        metrics: address and port where it tells of itself (`exporter`).

    Raises:
        PreflightError: there is no serving environment.
        Unreachable: another supervisor does so.
        OSError: nothing can listen at `metrics`.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with locks.alone(runs / deployment.SERVING / ".supervisor.lock", "another supervisor", 30.0):
        one = Supervisor(runs, Environment.read(), alone=alone)
        if metrics:
            Exporter(runs, lambda: one.goes_round).listen(*metrics)
        one.run()


def main() -> None:
    """The module as a program: `RUNS`."""
    with entered(Environment.read()):
        try:
            supervise(Path(sys.argv[1]))
        except Exception:
            _say(traceback.format_exc())
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
