"""`nvila rollouts` and `nvila rollback`: what a cluster serves of each model and why, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, PreflightError
from nvila.components.contracts.modelrollout import Counted, Decided, Override, Served
from nvila.components.kube.rollouts import ModelRollout, Rollouts
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.options import Json
from nvila.pipelines.planning.checks import configured
from nvila.pipelines.show.as_json import put

Namespace = Annotated[str | None, typer.Option(help="Namespace of the models; the context's by default.")]
COLUMNS = ("name", "model", "phase", "champion", "challenger", "step", "weight", "message")


def rollouts(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="A ModelRollout, or the registered model that it serves.", show_default=False)
    ] = "",
    as_json: Json = False,
    namespace: Namespace = None,
) -> None:
    """Tell what a cluster serves of each model: versions, step, share of the requests; with NAME also why.

    With NAME: conditions, and the last ten decisions with their numbers, the newest first. The cluster is that of
    KUBECONFIG; `nvila status` tells of this machine.

    Example: nvila rollouts nvila-tiny
    """
    found = of_cluster(context.obj, namespace)
    if name:
        one = found.called(name)
        shown: Any = told(one)
        lines = [*describe(one, found.namespace)]
    else:
        several = found.all()
        shown = {"namespace": found.namespace, "rollouts": [told(one) for one in several]}
        lines = [*table(several)] if several else [f"namespace {found.namespace} has no ModelRollout"]
    if as_json:
        put(shown)
        return
    for line in lines:
        typer.echo(tell(line))


def rollback(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A ModelRollout, or the registered model that it serves.")],
    reason: Annotated[str, typer.Option(help="Why, for the record.")],
    to: Annotated[str, typer.Option(metavar="VERSION", help="Version to serve; what served before by default.")] = "",
    as_json: Json = False,
    namespace: Namespace = None,
) -> None:
    """Serve the version before again, without steps, once its pods are ready; a version that is tried is withdrawn.

    It writes `spec.override` of the ModelRollout, for which Kubernetes asks for the right and which it audits. The
    controller acts on it within seconds, also while the model is paused or MLflow is away.

    Example: nvila rollback nvila-tiny --reason "answers in the wrong language since version 7"
    """
    found = of_cluster(context.obj, namespace)
    one = found.called(name)
    override = overriding(one, to, reason)
    found.override(one.name, override)
    serves = one.status.champion.version if one.status.champion else None
    if as_json:
        put({"name": one.name, "namespace": found.namespace, "serves": serves, "wanted": override.version})
        return
    instead = f" in place of version {serves}" if serves else ""
    typer.echo(tell(f"asked for version {override.version}{instead}; `nvila rollouts {one.name}` tells when it serves"))


def of_cluster(here: Environment, namespace: str | None) -> Rollouts:
    """Those of the cluster of the current context.

    Raises:
        PreflightError: none is configured.
    """
    cluster = configured(here.kubeconfig, namespace)
    if cluster is None:
        raise PreflightError("no cluster is configured", do="Set KUBECONFIG to a file that is there.")
    return Rollouts(cluster)


def overriding(one: ModelRollout, to: str, reason: str) -> Override:
    """What to ask for.

    Raises:
        ConfigError: there is no such version to go to, it serves already, or the very same was asked for before.
    """
    status, where = one.status, f"modelrollout/{one.name}"
    version = to or (status.previous.version if status.previous else "")
    if not version:
        serves, tried = status.champion, status.challenger
        only = f"; --to {serves.version} only withdraws version {tried.version}" if serves and tried else ""
        raise ConfigError(
            "nothing has served before what serves now",
            where=where,
            do=f"Name a version of the registry with --to{only}.",
        )
    try:
        wanted = Override(version=version, reason=reason)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--to" if first["loc"] == ("version",) else "--reason"
        raise ConfigError(first["msg"], where=option, value=first["input"]) from None
    if status.champion and status.champion.version == version and not status.challenger:
        raise ConfigError("this version serves already", where=where, value=version)
    if wanted == status.overridden:
        raise ConfigError(
            "this was asked for before, and acted on", where=where, value=version, do="Give another --reason."
        )
    return wanted


def told(one: ModelRollout) -> dict[str, Any]:
    """For programs: the status, and what of the spec goes with it."""
    kept = {"name": one.name, "model": one.model, "paused": bool(one.said.get("paused"))}
    asked = {"hostnames": one.said.get("hostnames") or [], "override": one.said.get("override")}
    left: dict[str, Any] = {"model": True, "pending": True, "challenger": {"seen", "champion_seen"}}
    return kept | asked | one.status.model_dump(mode="json", exclude=left)


def table(found: list[ModelRollout]) -> Iterator[str]:
    """A line for each, with a head."""
    rows = [COLUMNS, *(_row(one) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield "  ".join((*cells, row[-1])).rstrip()


def describe(one: ModelRollout, namespace: str) -> Iterator[str]:
    """All of one, for people."""
    status = one.status
    paused = ", paused" if one.said.get("paused") else ""
    yield f"modelrollout/{one.name} in namespace {namespace}: model {one.model}, {status.phase}{paused}"
    if status.message:
        yield f"  {status.message}"
    if hosts := one.said.get("hostnames"):
        yield f"  asked at {', '.join(hosts)}"
    versions = {"champion": status.champion, "challenger": status.challenger, "previous": status.previous}
    for role, version in versions.items():
        if version:
            at = f", step {status.step} of {status.steps}, {status.weight} per cent" if role == "challenger" else ""
            yield f"{role}: {_version(version)}{at}"
    for left in status.leaving:
        yield f"leaving: {_version(left)}"
    override = one.said.get("override")
    if override and (status.overridden is None or override != status.overridden.model_dump(by_alias=True)):
        yield f"override: version {override.get('version')}, not acted on yet: {override.get('reason')}"
    yield "conditions:" if status.conditions else "no controller has written conditions yet"
    for condition in status.conditions:
        said = f": {condition.message}" if condition.message else ""
        since = condition.last_transition_time
        yield f"  {condition.type} {condition.status} ({condition.reason}) since {since}{said}"
    yield "decisions, the newest first:" if status.decisions else "no decisions yet"
    for decided in status.decisions:
        yield from _decision(decided)


def _row(one: ModelRollout) -> tuple[str, ...]:
    status = one.status
    roles = [version.version if version else "-" for version in (status.champion, status.challenger)]
    step = f"{status.step}/{status.steps}" if status.challenger else "-"
    phase = f"{status.phase} (paused)" if one.said.get("paused") else status.phase
    return one.name, one.model, phase, *roles, step, f"{status.weight}%", status.message


def _version(one: Served) -> str:
    return f"version {one.version} ({one.digest[:12]}) since {one.since}"


def _decision(one: Decided) -> Iterator[str]:
    instead = f" (version {one.instead_of} served)" if one.instead_of else ""
    who = f", asked for by {one.user}" if one.user else ""
    yield f"  {one.at}  version {one.version} {one.verdict}{instead}, step {one.step}, {one.weight} per cent{who}"
    for reason in one.reasons:
        yield f"    {reason}"
    for whose, counted in (("its", one.counted), ("the champion's", one.champion_counted)):
        if counted:
            yield f"    {whose} requests: {_counted(counted)}"
    if asked := one.pinned:
        agreed = f"{asked.agreed} of {asked.asked} as evaluated, {asked.right} right, {asked.errors} failed"
        yield f"    pinned prompts: {agreed}"


def _counted(of: Counted) -> str:
    first = f", {of.first_token_seconds / of.first_tokens:.3f} s to the first token" if of.first_tokens else ""
    later = f", {1000 * of.token_seconds / of.tokens:.1f} ms from token to token" if of.tokens else ""
    return f"{of.requests}, {of.errors} failed{first}{later}"
