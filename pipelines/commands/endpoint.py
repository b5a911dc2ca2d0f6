"""`nvila serve`, `status` and `stop`: the endpoint by hand. `rollout` starts the same one after its checks."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from nvila.components.contracts.addresses import host_and_port
from nvila.components.contracts.errors import ConfigError, PreflightError, RolloutError
from nvila.components.contracts.processes import Process
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.contracts.recipe.yaml12 import load_yaml
from nvila.components.serve import deployment, interpreter, server
from nvila.components.serve.deployment import Decision, Role, Status, Version, Wanted
from nvila.components.tracking.checkpoints import find_model

DEADLINE_SECONDS = 300.0
OPTION = "--option"


@dataclass(frozen=True)
class Foreground:
    """What is said to an endpoint that stays in its process, as in a pod."""

    version: str | None = None
    """Number in the registry of what the folder holds; 0 without."""
    fallback: str | None = None
    """`host:port` of the endpoint that is asked what this one fails to answer."""
    metrics_port: int | None = None
    """Where it tells of itself."""

    @classmethod
    def of(cls, stays: bool, **given: Any) -> Foreground | None:
        """The options of the command line; None of one that does not stay.

        Raises:
            ConfigError: one of them has no effect then, or the other endpoint has no port.
        """
        if not stays:
            for name, value in given.items():
                if value is not None:
                    where = f"--{name.replace('_', '-')}"
                    raise ConfigError("only an endpoint that stays has this", where=where, do="Say --foreground too.")
            return None
        if given.get("fallback") is not None:
            try:
                host_and_port(given["fallback"])
            except ValueError:
                raise ConfigError("not host:port", where="--fallback", value=given["fallback"]) from None
        return cls(**given)


def serve(
    reference: str,
    host: str,
    port: int,
    runs: Path,
    key: SecretStr | None,
    *,
    name: str | None = None,
    options: Iterable[str] = (),
    foreground: Foreground | None = None,
) -> Status | None:
    """Start the endpoint of a model, wait until it answers, and tell of it; nothing to do when it runs already.

    Args:
        reference: of the model, as of `find_model`.
        host: address to listen on.
        port: port to listen on.
        runs: the runs folder.
        key: what requests must show; an endpoint that runs with another one is started again.
        name: what requests call the model; its own name without it.
        options: `key=value` pairs of the recipe's section `rollout.endpoint`.
        foreground: look after it in this process until a signal comes, and return None then; how.

    Raises:
        ConfigError: no such model or option, or a model that vLLM does not read.
        DataError: its files are damaged.
        PreflightError: another model is being served, nothing can listen there, or there is no serving environment.
        RolloutError: the server did not come up.
    """
    runs, given = runs.absolute(), [*options]
    settings = settings_of(given)
    deployment.require_address(runs, host, port)  # before anything is read or downloaded
    if foreground and foreground.metrics_port is not None:
        server.require_address(host, foreground.metrics_port)
    interpreter.envoy()
    version = _version(reference, runs, name).model_copy(update={"settings": settings})
    with deployment.rolling(runs):
        before = deployment.read(runs, Wanted) if deployment.running(runs) else None
        served = before.champion if before else None
        if before and served:
            version = version.model_copy(update={} if given else {"settings": served.settings})
            if (served, before.host, before.port) != (version, host, port) or foreground:
                at = f"{served.name} version {served.version} is being served at {before.host}:{before.port}"
                raise PreflightError(f"{at}, as it is", do="`nvila stop` first.")
        fallback = foreground.fallback if foreground else None
        asked: dict[str, Any] = {"host": host, "port": port, "weight": 0, "fallback": fallback}
        if foreground:
            _in_foreground(runs, asked | {"champion": version}, key, foreground)
            return None
        try:
            if not served:
                _until_ready(runs, "challenger", asked | {"challenger": version, "tried_by": Process.this()}, key)
            champion = {"champion": version, "challenger": None, "tried_by": None, "replaced": None}
            return _until_ready(runs, "champion", asked | champion, key)
        except BaseException:
            if not served:
                with deployment.exclusive(runs):
                    deployment.end(runs)
            raise


def settings_of(options: Iterable[str]) -> EndpointSettings:
    """The settings that `key=value` pairs come to; values are YAML, those of a list may have commas between them.

    Raises:
        ConfigError: no such option, or a value that it does not take.
    """
    found: dict[str, Any] = {}
    for pair in options:
        key, equals, text = pair.partition("=")
        if not equals or key not in EndpointSettings.model_fields:
            known = ", ".join(EndpointSettings.model_fields)
            raise ConfigError("an option is written key=value", where=OPTION, value=pair, do=f"Keys: {known}.")
        is_list = isinstance(EndpointSettings.model_fields[key].default, list)
        found[key] = [word for word in text.split(",") if word] if is_list else load_yaml(text)
    try:
        return EndpointSettings.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(first["msg"], where=f"{OPTION} {where}", value=first["input"]) from None


def stop(runs: Path) -> list[str]:
    """Stop everything that is served from a runs folder, and what is left of it; returns what was stopped."""
    runs = runs.absolute()
    if not (runs / deployment.SERVING).is_dir():
        return []
    with deployment.exclusive(runs):
        return deployment.end(runs)


def look(runs: Path) -> dict[str, Any]:
    """What is served from a runs folder, as JSON; `serving` is whether users are answered."""
    runs = runs.absolute()
    status, decision = deployment.running(runs), deployment.read(runs, Decision)
    wanted = deployment.read(runs, Wanted) if status else None
    told: dict[str, Any] = {"serving": False, "endpoint": None, "left": [], "last_decision": None}
    if decision:
        told["last_decision"] = decision.model_dump()
    if status is None or wanted is None:
        return told | {"left": deployment.leftovers(runs)}
    healthy = _answers(wanted)
    champion = status.of("champion")
    weights = {"challenger": wanted.weight if status.of("challenger") else 0}
    told["endpoint"] = {
        "url": status.url,
        "healthy": healthy,
        "since": status.since or None,
        "asks_for_key": status.key is not None,
        "trouble": status.trouble or None,
        "restarts": {"envoy": status.envoy_restarts, "supervisor": status.restarts},
        "pid": status.supervisor.pid,
        "versions": [
            {
                "role": one.role,
                "model": one.version.name,
                "version": one.version.version,
                "digest": one.version.digest,
                "state": one.state,
                "healthy": one.state != "waiting" and server.is_ready(one.url),
                "weight": 0 if one.state == "draining" else weights.get(one.role, 100 - weights["challenger"]),
                "restarts": one.restarts,
                "ended": one.ended or None,
                "since": one.since,
                "url": one.url,
                "pid": one.pid,
                "log": one.log,
            }
            for one in status.versions
        ],
    }
    return told | {"serving": healthy and champion is not None and champion.state == "ready"}


def lines(told: dict[str, Any]) -> list[str]:
    """What `look` has found, for people."""
    found, endpoint = list[str](), told["endpoint"]
    if endpoint is None:
        found.append("nothing is served")
    else:
        state = "answers" if endpoint["healthy"] else "does not answer"
        since = f" since {_time(endpoint['since'])}" if endpoint["since"] else ""
        key = ", with a key" if endpoint["asks_for_key"] else ""
        restarts = endpoint["restarts"]
        found.append(f"{endpoint['url']}  {state}{since}{key}")
        found.append(f"restarts: Envoy {restarts['envoy']}, supervisor {restarts['supervisor']}")
        found += [f"trouble: {endpoint['trouble']}"] if endpoint["trouble"] else []
        for one in endpoint["versions"]:
            state = f"{one['state']}, {'healthy' if one['healthy'] else 'not healthy'}"
            found.append(
                f"{one['role']}: {one['model']} version {one['version']} ({one['digest'][:12]}) {state} "
                f"since {_time(one['since'])}, {one['weight']}% of requests, {one['restarts']} restarts"
            )
            found += [f"  ended: {one['ended'].splitlines()[-1]}"] if one["ended"] else []
    if decision := told["last_decision"]:
        version, reasons = decision["version"], "; ".join(decision["reasons"])
        what = f"{version['name']} version {version['version']} {decision['decision']}"
        found.append(f"last decision: {what} at {_time(decision['at'])}: {reasons}")
    found += [f"{one} (nvila stop ends it)" for one in told["left"]]
    return found


def _version(reference: str, runs: Path, name: str | None) -> Version:
    from nvila.components.model.checkpoint.flat import open_checkpoint
    from nvila.components.model.text.tokenizer import require_files

    model = find_model(reference, runs)
    checkpoint = open_checkpoint(model.folder)
    if checkpoint.layout != "serving":
        raise ConfigError(
            "vLLM reads the layout `serving` only",
            where=str(model.folder),
            do=f"nvila convert {reference} FOLDER --to serving, and serve that; or ask this one with `nvila infer`.",
        )
    require_files(checkpoint.tokenizer)
    return Version(
        name=name or model.name, version=model.version, digest=model.digest, model_dir=str(checkpoint.folder)
    )


def _until_ready(runs: Path, role: Role, fields: dict[str, Any], key: SecretStr | None) -> Status:
    """Have this served, and wait until the server of the role is ready."""
    with deployment.exclusive(runs):
        before = deployment.read(runs, Wanted)
        known = before.key if before and deployment.matches(before.key, key) else deployment.fingerprint(key)
        wanted = deployment.change(runs, key=known, **fields)
        deployment.ensure_supervisor(runs, key)
    version = fields[role]
    progress = Progress(f"starting {version.name} version {version.version}")

    def ready(status: Status) -> bool:
        one = status.of(role)
        if one and one.state == "waiting" and one.restarts:
            raise RolloutError(f"the server ended while starting: {one.ended}", where=one.log)
        return one is not None and one.version == version and one.state == "ready"

    return deployment.wait_for(runs, wanted.generation, ready, DEADLINE_SECONDS, lambda status: progress.update(0))


def _in_foreground(runs: Path, fields: dict[str, Any], key: SecretStr | None, how: Foreground) -> None:
    from nvila.components.serve.supervisor import supervise

    if how.version is not None:
        fields["champion"] = fields["champion"].model_copy(update={"version": how.version})
    with deployment.exclusive(runs):
        deployment.end(runs)
        deployment.change(runs, key=deployment.fingerprint(key), **fields)
    metrics = None if how.metrics_port is None else (fields["host"], how.metrics_port)
    supervise(runs, alone=True, metrics=metrics)


def _answers(wanted: Wanted) -> bool:
    """Whether `/health` says yes where users ask."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the certificate is for other names
    connection = (
        http.client.HTTPSConnection(wanted.host, wanted.port, timeout=5, context=context)
        if wanted.settings.certificate
        else http.client.HTTPConnection(wanted.host, wanted.port, timeout=5)
    )
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
