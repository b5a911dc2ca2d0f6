"""Tells Kubeflow Trainer how far a stage is: `status.trainerStatus` of its TrainJob.

Where Trainer's feature `TrainJobStatus` is on (2.2, KEP-2779), it gives each pod an address to post to, the certificate
of who answers there, and a file with a token that it renews. Training never waits for an answer, nor needs one.
"""

from __future__ import annotations

import json
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.text import say

EVERY_SECONDS = 15.0
"""Between two posts: the server limits how often a job may speak."""
PATIENCE_SECONDS = 5.0
"""For an answer."""


class TrainerStatus:
    """Posts the newest of what it is told, in a thread of its own."""

    def __init__(self, here: Environment) -> None:
        self._here = here
        self._newest: dict[str, Any] = {}
        self._changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def tell(self, share: float, seconds_left: float, metrics: Mapping[str, float]) -> None:
        """The stage is so far, from 0 to 1; returns at once."""
        self._newest = status(share, seconds_left, metrics, datetime.now(UTC))
        self._changed.set()

    def close(self) -> None:
        """Post what was told last, if there is an answer in time, and end."""
        self._over.set()
        self._changed.set()
        self._thread.join(2 * PATIENCE_SECONDS)

    def _work(self) -> None:
        before = ""
        while True:
            self._changed.wait()
            self._changed.clear()
            over = self._over.is_set()
            if self._newest:
                before = self._post(self._newest, before)
            if over:
                return
            self._over.wait(EVERY_SECONDS)

    def _post(self, newest: Mapping[str, Any], before: str) -> str:
        """Why it could not be posted, which is said where it was not `before`."""
        try:
            post(newest, self._here)
            return ""
        except (OSError, ValueError) as error:
            why = f"Kubeflow Trainer is not told of the progress: {type(error).__name__}: {error}"
            if why != before:
                say(why)
            return why


def status(share: float, seconds_left: float, metrics: Mapping[str, float], now: datetime) -> dict[str, Any]:
    """The body of a post, in the limits of the TrainJob's definition."""
    return {
        "trainerStatus": {
            "progressPercentage": min(100, max(0, int(100 * share))),
            "estimatedRemainingSeconds": min(2**31 - 1, max(0, round(seconds_left))),
            "lastUpdatedTime": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in metrics.items()],
        }
    }


def post(body: Mapping[str, Any], here: Environment) -> None:
    """Send it.

    Raises:
        OSError: nobody answers, or the answer is a refusal; a file is not there.
        ValueError: the address is none.
    """
    token = here.trainer_status_token.read_text(encoding="utf-8").strip() if here.trainer_status_token else ""
    trusted = ssl.create_default_context(cafile=here.trainer_status_ca)
    # The controller is inside the cluster, where no proxy leads to.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(here.trainer_status_url, json.dumps(body).encode(), headers, method="POST")
    opener.open(request, timeout=PATIENCE_SECONDS).close()
