"""The controller as a program: `python -m nvila.infra.controller --namespace models --fetch-image IMAGE`."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

from nvila.components.contracts.environment import Environment, entered, revealed
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.text import say
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Advice, Patience, Requests
from nvila.infra.controller import tell
from nvila.infra.controller.lease import Lease
from nvila.infra.controller.loop import Controller
from nvila.infra.controller.objects import Platform
from nvila.infra.controller.registry import Registry

LEASE = "nvila-controller"
PATIENCE = Patience.within(8.0)
"""An API server that is away must not hold up what is done about the registry, nor a lease that runs out."""
ADVICE = Advice(
    right="Bind the chart's Role nvila-controller to its service account.",
    kind="Install the chart with controller.enabled, and the Gateway API.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; returns the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        with entered(Environment.read()) as here:
            stop = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            controller = _controller(asked, here)
            server = controller.metrics.serve(asked.host, asked.port)
            tell.say("the controller begins", namespaces=[one.namespace for one in controller.clusters])
            controller.run(stop)
            server.shutdown()
            tell.say("the controller ends")
            return 0
    except (NvilaError, OSError) as error:
        say(str(error))
        return int(error.exit_code) if isinstance(error, NvilaError) else 1


def _controller(asked: argparse.Namespace, here: Environment) -> Controller:
    clusters = [
        Cluster(Requests(connect(here.kubeconfig, namespace), PATIENCE, ADVICE))
        for namespace in asked.namespace or [None]
    ]
    leases = Cluster(
        Requests(connect(here.kubeconfig, asked.lease_namespace or clusters[0].namespace), PATIENCE, ADVICE)
    )
    holder = f"{here.hostname or socket.gethostname()}-{os.getpid()}"
    return Controller(
        clusters=clusters,
        registry=Registry(here),
        lease=Lease(leases, LEASE, holder),
        platform=Platform(asked.fetch_image, asked.pull_policy, asked.cache_claim, tuple(asked.pull_secret)),
        key=here.api_key,
        webhook=tell.Webhook(revealed(here.webhook_url), revealed(here.webhook_secret)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nvila.infra.controller",
        description="Rolls out what the registry's alias challenger names, for every ModelRollout of some namespaces. "
        "The registry is MLFLOW_TRACKING_URI; the cluster is KUBECONFIG's, or the one this pod is in.",
    )
    add = parser.add_argument
    add("--namespace", action="append", default=[], help="where ModelRollouts are looked for; may be repeated")
    add("--fetch-image", required=True, help="image that brings weights to a node: this controller's own")
    add("--pull-policy", default="IfNotPresent", choices=["Always", "IfNotPresent", "Never"], help="of serving pods")
    add("--pull-secret", action="append", default=[], help="name of a Secret for all images; may be repeated")
    add("--cache-claim", default="nvila-cache", help="PersistentVolumeClaim of the node's cache")
    add("--lease-namespace", default="", help="where the Lease is by which one of several controllers leads")
    add("--host", default="0.0.0.0", help="where /metrics and /healthz are answered")
    add("--port", type=int, default=8080, help="the port there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
