"""What can go wrong with an API server: one name for each, whatever was asked of it."""

from __future__ import annotations

from nvila.components.contracts.errors import ConfigError, NvilaError, PreflightError


class NoCluster(PreflightError):
    """Neither a kubeconfig nor the service account of a pod says where a cluster is."""


class NotThere(NvilaError):
    """The object does not exist."""


class NotServed(PreflightError):
    """The cluster does not know this kind of object, or has no such namespace."""


class Conflict(NvilaError):
    """An object of that name exists already, or is another one than was meant, or somebody else owns the field."""


class Denied(PreflightError):
    """This account may not do it, or a rule of the cluster forbids it."""


class Refused(ConfigError):
    """The API server refuses what it was given, and would do so for ever."""


class Away(NvilaError):
    """The API server could not be reached in time, or a stream of it broke off."""
