"""What can go wrong with an API server: one name for each, whatever was asked of it."""

from __future__ import annotations

from nvila.components.contracts.errors import ConfigError, NvilaError, PreflightError


class NoCluster(PreflightError):
    """Neither a kubeconfig nor the service account of a pod says where a cluster is."""


class ApiError(NvilaError):
    """Any answer of an API server that is not what was asked for, or none."""


class NotThere(ApiError):
    """The object does not exist."""


class NotServed(PreflightError, ApiError):
    """The cluster does not know this kind of object, or has no such namespace."""


class Conflict(ApiError):
    """An object of that name exists already, or is another one than was meant, or somebody else owns the field."""


class Denied(PreflightError, ApiError):
    """This account may not do it, or a rule of the cluster forbids it."""


class NotKnown(PreflightError, ApiError):
    """The API server does not accept the credentials, or no safe connection comes about."""


class Refused(ConfigError, ApiError):
    """The API server refuses what it was given, and would do so for ever."""


class Away(ApiError):
    """The API server could not be reached in time, or a stream of it broke off."""
