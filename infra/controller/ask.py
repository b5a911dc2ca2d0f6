"""Asks pods the pinned prompts of a version, in the background: a round of the loop only looks what came of it.

The prompts are fetched once per file, compared with the digest in the registry, and kept on the disk. Each is read,
sent and judged by itself, so that memory holds a few of them, however many versions are asked at a time.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from nvila.components.contracts.addresses import http_url
from nvila.components.contracts.digests import is_sha256
from nvila.components.contracts.errors import DamagedError, DataError, NvilaError, Unreachable
from nvila.components.contracts.modelrollout import HTTP_PORT, MOST_PINNED_BYTES, PIN_HEADER, PINNED_FILE
from nvila.components.rollout import pinned
from nvila.components.rollout.policy import Asked
from nvila.components.serve import server
from nvila.infra.controller.registry import Registry
from nvila.infra.controller.seen import Registered
from nvila.infra.controller.tell import say

MOST_FILES = 8
"""Kept on the disk."""
AT_ONCE = 2
"""Versions that are asked at the same time; others wait."""
LARGE_BYTES = 2**20
"""A larger prompt is asked while no other such is."""
MOST_ANSWERS = 1000
"""Kept; the oldest go first."""


class Prompts:
    """Files of pinned prompts, each fetched when it is first needed."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="nvila-pinned-")
        self.folder, self._fetching = Path(self._kept.name), threading.Lock()

    def lines(self, registered: Registered, registry: Registry) -> Iterator[bytes]:
        """The lines of the version's file.

        Raises:
            Unreachable: the registry, or the store behind it, does not answer.
            DamagedError: the file is not the one that was registered.
            NvilaError: there is none, or it does not come.
        """
        with self._fetching:
            if not is_sha256(registered.pinned):
                raise DataError("no prompts were registered with the version", where=registered.model)
            path = self.folder / registered.pinned
            if not path.is_file():
                self._fetch(registered, registry, path)
            stream = path.open("rb")
        with stream:
            yield from stream

    def _fetch(self, registered: Registered, registry: Registry, path: Path) -> None:
        for old in sorted(path.parent.iterdir(), key=lambda one: one.stat().st_mtime_ns)[: 1 - MOST_FILES]:
            old.unlink()
        partial = path.with_name("partial")
        partial.unlink(missing_ok=True)
        digest = registry.artifact(registered, PINNED_FILE, partial, MOST_PINNED_BYTES)
        if digest != registered.pinned:
            raise DamagedError(
                "the pinned prompts are not those that were registered",
                where=f"{registered.model} version {registered.version}: {PINNED_FILE}",
                value=digest,
            )
        partial.rename(path)


class Asking:
    """What versions were asked, by a key of the caller's; all of it is lost with the process, and asked again."""

    def __init__(self, port: int = HTTP_PORT) -> None:
        """Nobody is asked yet.

        Args:
            port: of the pods.
        """
        self._port, self._prompts = port, Prompts()
        self._lock, self._parsing, self._room = threading.Lock(), threading.Lock(), threading.Semaphore(AT_ONCE)
        self._large = threading.Lock()
        self._under_way: set[str] = set()
        self._answers: OrderedDict[str, Asked] = OrderedDict()
        self._turns: dict[str, int] = {}

    def begin(
        self,
        key: str,
        registered: Registered,
        version: str,
        addresses: Sequence[str],
        count: int,
        registry: Registry,
        api_key: str,
    ) -> None:
        """Ask the first prompts of a version; nothing happens where this was begun by the same key.

        Args:
            key: under which the answer is found.
            registered: whose prompts.
            version: which is asked, this one or another of the model.
            addresses: of its pods, which take turns; without any nothing begins.
            count: of the prompts.
            registry: where the file comes from.
            api_key: what the endpoint asks for; empty for none.
        """

        def work() -> Asked:
            found = Asked()
            for number, line in enumerate(islice(self._prompts.lines(registered, registry), count)):
                found += self._ask(line, registered.model, version, addresses[number % len(addresses)], api_key)
            return found

        self._start(key, addresses, work)

    def one(
        self, key: str, registered: Registered, version: str, addresses: Sequence[str], registry: Registry, api_key: str
    ) -> None:
        """Ask one more prompt of a version, the next one each time, unless one is still being asked: where users ask
        too little, the pods count something to decide by. Arguments as of `begin`; there is no answer to be had."""

        def work() -> None:
            turn = self._turns.get(key, 0)
            lines = list(islice(self._prompts.lines(registered, registry), turn, turn + 1))
            self._turns[key] = turn + 1 if lines else 0
            for line in lines:
                self._ask(line, registered.model, version, addresses[turn % len(addresses)], api_key)

        self._start(f"{key} one", addresses, work)

    def answer(self, key: str) -> Asked | None:
        """What has come of it; None before all are answered.

        Of prompts that cannot be had at all, none were asked, which the policy takes for too few.
        """
        with self._lock:
            return self._answers.get(key)

    def _start(self, key: str, addresses: Sequence[str], work: Callable[[], Asked | None]) -> None:
        with self._lock:
            if key in self._answers or key in self._under_way or not addresses:
                return
            self._under_way.add(key)

        def run() -> None:
            found = None
            try:
                with self._room:
                    found = work()
            except (Unreachable, OSError) as error:
                say(f"pinned prompts are asked later: {error}", key=key)
            except NvilaError as error:
                say(f"pinned prompts cannot be asked: {error}", level="error", key=key)
                found = Asked()
            finally:
                done(found)

        def done(found: Asked | None) -> None:
            with self._lock:
                self._under_way.discard(key)
                if found is not None:
                    self._answers[key] = found
                while len(self._answers) > MOST_ANSWERS:
                    self._answers.popitem(last=False)

        threading.Thread(target=run, daemon=True).start()

    def _ask(self, line: bytes, model: str, version: str, address: str, api_key: str) -> Asked:
        url, headers = http_url(address, self._port), {PIN_HEADER: version}
        with self._large if len(line) > LARGE_BYTES else nullcontext():
            with self._parsing:  # one at a time: a prompt with its media is in memory several times meanwhile
                body, expected, answer = _read(line, model)
            return pinned.judged(lambda: server.send(url, body, api_key=api_key, headers=headers), expected, answer)


def _read(text: bytes, model: str) -> tuple[bytes, str, str]:
    """What is sent, what the evaluated model said, and the truth."""
    try:
        prompt = json.loads(text)
        if isinstance(prompt["body"], dict) and isinstance(prompt["expected"] + prompt["answer"], str):
            return json.dumps(prompt["body"] | {"model": model}).encode(), prompt["expected"], prompt["answer"]
    except (ValueError, LookupError, TypeError):
        pass
    raise DataError("a line of the pinned prompts is none", value=text[:80])
