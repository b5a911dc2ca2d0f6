"""Finds the cluster: the current context of a kubeconfig, or the service account of the pod that this process is in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import PreflightError
from nvila.components.kube.errors import NoCluster

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Connection:
    """A client of one API server."""

    client: Any
    """`kubernetes.client.ApiClient`; it asks nothing again by itself."""
    name: str
    """Of the context, for people."""
    namespace: str

    @property
    def host(self) -> str:
        """URL of the API server."""
        return str(self.client.configuration.host)


def connect(kubeconfig: str | None, namespace: str | None = None) -> Connection:
    """A client, and the namespace that it works in; nothing is asked yet.

    Args:
        kubeconfig: the file, or several as `KUBECONFIG` lists them; without one the pod's service account is taken.
        namespace: the context's or the pod's own where none is given.

    Raises:
        NoCluster: there is neither.
        PreflightError: the kubeconfig cannot be used.
    """
    import yaml
    from kubernetes import client, config

    configuration = client.Configuration()
    configuration.retries = False  # what is asked again, and how often, is decided by `Requests`
    if kubeconfig is None:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException as error:
            raise NoCluster(f"this is no pod with a service account: {error}") from None
        own = NAMESPACE_FILE.read_text(encoding="utf-8").strip() if NAMESPACE_FILE.is_file() else "default"
        return Connection(client.ApiClient(configuration), "this cluster", namespace or own)
    where = f"KUBECONFIG={kubeconfig}"
    try:
        _, context = config.list_kube_config_contexts(kubeconfig)
    except config.ConfigException as error:
        raise NoCluster(f"no current context: {error}", where=where) from None
    except (yaml.YAMLError, *_CONTENT) as error:
        raise _unusable(error, where) from None
    try:
        config.load_kube_config(kubeconfig, client_configuration=configuration)
    except (config.ConfigException, *_CONTENT) as error:
        raise _unusable(error, where) from None
    own = context["context"].get("namespace") or "default"
    return Connection(client.ApiClient(configuration), context["name"], namespace or own)


_CONTENT = (OSError, ValueError, TypeError, AttributeError, LookupError)
"""What a file raises that is no kubeconfig: the library does not check what it reads."""


def _unusable(error: Exception, where: str) -> PreflightError:
    return PreflightError(f"the kubeconfig cannot be used: {' '.join(str(error).split())}", where=where)
