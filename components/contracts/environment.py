"""The environment variables: all that ours read, once, as one frozen object; and the few that libraries need written.

A process reads them at its entry (`Environment.read`) and hands the object, or a part of it, on. Nothing else of ours
touches `os.environ`: a lint rule holds that. The table in docs/environment.md, the keys that the compiled pipeline
takes from the chart's ConfigMap and Secret, and the variables of child processes come from the fields.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.pipelines import PipelineName
from nvila.components.contracts.places import local_folder
from nvila.components.contracts.site import OLD_KEYS, Site
from nvila.components.contracts.surroundings import settle
from nvila.components.contracts.text import say

By = Literal["user", "config", "secret", "pipeline", "platform", "launcher", "kubernetes"]
"""Who sets a variable, as docs/environment.md explains."""

OF_TESTS = {"NVILA_KUBE_TOOLS", "NVILA_CRDS", "NVILA_NODE_IMAGE", "NVILA_POSTGRES_IMAGE", "NVILA_IMAGE"}
"""Read by the tests of a checkout only."""
_SERVICE = re.compile(r"NVILA_\w+_(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)")
"""Kubernetes writes these into every pod beside a Service whose name begins with `nvila-`."""


def _variable(name: str, *by: By, default: Any = None, shown: bool = True) -> Any:
    """A field that is read from the variable `name`; `shown` is whether its value may stand in a log."""
    return Field(default, alias=name, repr=shown, json_schema_extra={"by": list(by)})


def _folder(name: str) -> AfterValidator:
    return AfterValidator(lambda value: local_folder(value, name))


def _token(name: str) -> AfterValidator:
    """Refuses what no request can carry: `Authorization: Bearer` is one line of ASCII, and has something behind it."""

    def check(token: SecretStr) -> SecretStr:
        if not re.fullmatch("[!-~]+", token.get_secret_value()):
            raise ConfigError(
                "no key: it is empty, or has spaces, line breaks or letters that are not ASCII",
                where=name,
                do="Give one word of ASCII letters, digits and signs, or unset the variable.",
            )
        return token

    return AfterValidator(check)


class Environment(BaseModel):
    """What the variables of a process say; an empty one counts as unset, but for a key of the endpoint."""

    model_config = ConfigDict(
        frozen=True, use_attribute_docstrings=True, populate_by_name=True, hide_input_in_errors=True
    )

    store: Annotated[Path | None, _folder("NVILA_STORE")] = _variable("NVILA_STORE", "platform", "pipeline")
    """Folder of finished work (`store` where a step is started without it); the index of digests lies in it."""
    run: Annotated[Path | None, _folder("NVILA_RUN")] = _variable("NVILA_RUN", "platform", "pipeline")
    """Folder of the pipeline run that a step belongs to (`runs/adhoc`); `$NVILA_RUN_ID` in it is filled in."""
    run_id: str | None = _variable("NVILA_RUN_ID", "pipeline")
    """Id of the run on a cluster, which only the pod knows; set, this process is a step's pod."""
    root: str = _variable("NVILA_ROOT", "pipeline", default="")
    """Folder that relative paths of a recipe begin at; the working directory without it."""
    pipeline: PipelineName | None = _variable("NVILA_PIPELINE", "platform", "pipeline")
    """Name of the pipeline that a step is one of; its recipe must be one for it."""
    code: str | None = _variable("NVILA_CODE", "pipeline")
    """Digest of the code that the pipeline was compiled from; a step of other code refuses to run."""
    site: Site | None = _variable("NVILA_SITE", "config")
    """The cluster as JSON: what its nodes are, and which module starts heavy work as training jobs (docs/launch.md)."""
    cache: Annotated[Path | None, _folder("NVILA_CACHE")] = _variable("NVILA_CACHE", "user", "config")
    """Folder of downloaded weights; `~/.cache/nvila`, and the hub's own, without it."""
    progress_file: Path | None = _variable("NVILA_PROGRESS_FILE", "platform")
    """File that a step and its child processes write their progress to, for the terminal's table."""
    serve_python: Path | None = _variable("NVILA_SERVE_PYTHON", "user")
    """The Python that has vLLM; `.venv-serve/bin/python` here or in the checkout without it."""
    api_key: Annotated[SecretStr, _token("NVILA_API_KEY")] | None = _variable("NVILA_API_KEY", "user", "secret")
    """Bearer token that the endpoint asks for; without it the endpoint is open to this machine."""
    webhook_url: SecretStr | None = _variable("NVILA_WEBHOOK_URL", "secret")
    """Where the end of a run on a cluster is reported to; who knows it may often post there."""
    webhook_secret: SecretStr | None = _variable("NVILA_WEBHOOK_SECRET", "secret")
    """Signs those reports."""

    pipelines_endpoint: str | None = _variable("KF_PIPELINES_ENDPOINT", "user")
    """URL of Kubeflow Pipelines; the option `--host` of `nvila submit`, `status` and `logs` takes it."""
    pipelines_token: SecretStr | None = _variable("KF_PIPELINES_TOKEN", "user")
    """Bearer token for Kubeflow Pipelines."""
    pipelines_token_file: Path | None = _variable("KF_PIPELINES_SA_TOKEN_PATH", "kubernetes")
    """File of a token that Kubeflow renews in notebooks."""
    kubeconfig: str | None = _variable("KUBECONFIG", "user")
    """The cluster that `nvila plan` and `nvila rollouts` look at, that takes the jobs of a site, and serves models."""
    in_cluster: str | None = _variable("KUBERNETES_SERVICE_HOST", "kubernetes")
    """Set in every pod."""
    hostname: str = _variable("HOSTNAME", "kubernetes", default="")
    """In a pod, its name."""

    mlflow_tracking_uri: str | None = _variable("MLFLOW_TRACKING_URI", "user", "config", shown=False)
    """The tracking store; `mlflow.db` in the folder of runs without it."""
    mlflow_registry_uri: str | None = _variable("MLFLOW_REGISTRY_URI", "user", shown=False)
    """The registry, where it is not the tracking store."""
    mlflow_run_id: str | None = _variable("MLFLOW_RUN_ID", "kubernetes")
    """The parent run that KFP's MLflow plugin has opened; steps join it."""
    mlflow_username: str | None = _variable("MLFLOW_TRACKING_USERNAME", "user", "secret", shown=False)
    """Read by MLflow itself."""
    mlflow_password: SecretStr | None = _variable("MLFLOW_TRACKING_PASSWORD", "user", "secret")
    """Read by MLflow itself."""
    mlflow_token: Annotated[SecretStr, _token("MLFLOW_TRACKING_TOKEN")] | None = _variable(
        "MLFLOW_TRACKING_TOKEN", "user", "secret"
    )
    """Read by MLflow itself."""
    s3_endpoint: str | None = _variable("AWS_ENDPOINT_URL", "user", "config", shown=False)
    """The object store, where it is not Amazon's; read by boto3 itself."""
    s3_region: str | None = _variable("AWS_REGION", "user", "config")
    """Read by boto3 itself."""
    s3_key: SecretStr | None = _variable("AWS_ACCESS_KEY_ID", "user", "secret")
    """Read by boto3 itself."""
    s3_secret: SecretStr | None = _variable("AWS_SECRET_ACCESS_KEY", "user", "secret")
    """Read by boto3 itself."""
    hub_token: Annotated[SecretStr, _token("HF_TOKEN")] | None = _variable("HF_TOKEN", "user", "secret")
    """For private weights of `hf://`; read by the hub's client itself."""

    threads: str = _variable("OMP_NUM_THREADS", "user", "platform", default="")
    """Threads of a step; `nvila run` gives each step the whole machine."""
    rank: int = _variable("RANK", "launcher", default=0)
    """Number of a training process."""
    local_rank: int = _variable("LOCAL_RANK", "launcher", default=0)
    """Number of a training process on its machine: its GPU."""
    world: int = _variable("WORLD_SIZE", "launcher", default=1)
    """Number of training processes."""
    node: int = _variable("PET_NODE_RANK", "launcher", default=0)
    """Number of this node of a training job."""
    nodes: int = _variable("PET_NNODES", "launcher", default=1)
    """Number of its nodes."""
    master_address: str = _variable("PET_MASTER_ADDR", "launcher", default="")
    """Where its nodes meet."""
    master_port: int = _variable("PET_MASTER_PORT", "launcher", default=0)
    """The port there."""
    trainer_status_url: str = _variable("KUBEFLOW_TRAINER_SERVER_URL", "kubernetes", default="")
    """Where Kubeflow Trainer is told how far a training job is; set where its feature `TrainJobStatus` is on."""
    trainer_status_ca: Path | None = _variable("KUBEFLOW_TRAINER_SERVER_CA_CERT", "kubernetes")
    """File with the certificate of who answers there."""
    trainer_status_token: Path | None = _variable("KUBEFLOW_TRAINER_SERVER_TOKEN", "kubernetes")
    """File with the token for it, which Trainer renews."""
    profile: str = _variable("NVILA_PROFILE", "platform", default="")
    """Training step of which a few optimizer steps are profiled (the option `--profile`), or `all`."""
    vllm_key: Annotated[SecretStr, _token("VLLM_API_KEY")] | None = _variable("VLLM_API_KEY", "platform")
    """`NVILA_API_KEY` for the server's process: on its command line every user of the machine could read it."""
    endpoint: str = _variable("NVILA_ENDPOINT", "platform", default="")
    """For the server's process: JSON of the endpoint's settings and of the folder that it serves."""
    vllm_cache_gib: str = _variable("VLLM_CPU_KVCACHE_SPACE", "user", default="1")
    """GiB of vLLM's cache on a CPU."""
    vllm_binding: str = _variable("VLLM_CPU_OMP_THREADS_BIND", "user", default="nobind")
    """Cores that vLLM's threads are bound to."""
    podman_configuration: str | None = _variable("CONTAINERS_CONF", "user")
    """podman's configuration for the building of images; one that works in containers is written without it."""

    @property
    def run_folder(self) -> Path:
        """`run`, absolute; the folder of all runs, with the local registry in it, is around it."""
        return (self.run or Path("runs/adhoc")).absolute()

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """The object from these variables, the process's own by default.

        Raises:
            ConfigError: names the variable whose value is wrong.
        """
        source = os.environ if variables is None else variables
        names = {field.alias for field in cls.model_fields.values()}
        # A key that is set and empty is refused: an endpoint must not stand open because of a slip.
        found: dict[str, Any] = {n: v for n, v in source.items() if n in names and (v or n.endswith("_API_KEY"))}
        if "NVILA_RUN" in found:
            found["NVILA_RUN"] = re.sub(r"\$\{?NVILA_RUN_ID\}?", found.get("NVILA_RUN_ID", ""), found["NVILA_RUN"])
        if site := Site.read(source):
            found["NVILA_SITE"] = site
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise ConfigError(
                first["msg"], where=str(first["loc"][0]), value=source.get(str(first["loc"][0]))
            ) from None

    @property
    def on_cluster(self) -> bool:
        """Whether this process is a step's pod of the compiled pipeline."""
        return self.run_id is not None


def revealed(secret: SecretStr | None) -> str:
    """The text of a secret; empty where there is none."""
    return secret.get_secret_value() if secret else ""


def name_of(field: str) -> str:
    """The variable that a field is read from."""
    return str(Environment.model_fields[field].alias)


def named(**fields: object) -> dict[str, str]:
    """Values of fields by the names of their variables, for a process or a pod that is to read them."""
    return {name_of(field): str(value) for field, value in fields.items()}


def set_by() -> dict[str, Collection[By]]:
    """Who sets each variable."""
    return {str(f.alias): dict(f.json_schema_extra)["by"] for f in Environment.model_fields.values()}  # type: ignore


def kept(where: Literal["config", "secret"]) -> tuple[str, ...]:
    """The variables that steps on a cluster take from the chart's ConfigMap or Secret; every one may be missing."""
    return tuple(name for name, by in set_by().items() if where in by)


def notices(variables: Mapping[str, str] | None = None) -> list[str]:
    """What to say once about variables that are called like ours and are not, or not for long, a line each."""
    source = os.environ if variables is None else variables
    ours = {str(f.alias) for f in Environment.model_fields.values()} | set(OLD_KEYS)
    said = [old] if (old := Site.notice(source)) else []
    for name in sorted(source):
        if name.startswith("NVILA_") and name not in ours | OF_TESTS and not _SERVICE.fullmatch(name):
            near = difflib.get_close_matches(name, ours, 1)
            said.append(f"{name}: nothing reads this variable" + (f"; {near[0]} is one" if near else ""))
    return said


_entered: Environment | None = None


def current() -> Environment:
    """The environment of this process, for what lies many calls below every entry and changes no result.

    Downloads' cache, the index of digests, progress, MLflow's address, the place of a node and the serving Python: a
    step's arguments are what its result depends on, and these are not. Not a `ContextVar`: threads have to see it too.
    """
    return _entered or Environment.read()


@contextmanager
def entered(here: Environment) -> Iterator[Environment]:
    """Have `current` answer this as long as the context is open; an entry does so with what it has read.

    Raises:
        ConfigError: the process cannot work here, as of `settle`.
    """
    global _entered
    if here.on_cluster and here.site:  # KFP gives all steps of all sites the same variables
        for name, value in here.site.environment.items():
            os.environ.setdefault(name, value)
    for line in settle():
        say(line)
    before, _entered = _entered, here
    try:
        yield here
    finally:
        _entered = before


@contextmanager
def handed_down(**fields: object) -> Iterator[Environment]:
    """`entered` with other values of these fields, for this process and every child, whoever starts it.

    torchrun and `multiprocessing` start their processes with the variables of this one, and ask nobody.
    """
    variables = named(**fields)
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        with entered(current().model_copy(update=fields)) as here:
            yield here
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


def for_child(
    variables: Mapping[str, str] | None = None,
    *,
    unless_set: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    only: Collection[str] | None = None,
) -> dict[str, str]:
    """The variables of a child process: this process's own, changed.

    Args:
        variables: set, whatever they were.
        unless_set: set where they are not.
        without: left out.
        only: nothing else is handed on, where this is given.
    """
    inherited = {n: v for n, v in os.environ.items() if n not in without and (only is None or n in only)}
    return {**(unless_set or {}), **inherited, **(variables or {})}


_LIBRARIES = {
    # What each reads when it is imported, and nowhere else.
    "mlflow": {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # MLflow's own patience with a server that is away is four minutes a request, in silence.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    },
    "transformers": {"TRANSFORMERS_VERBOSITY": "error"},  # a command's output is the answer alone
    "deepspeed": {"DS_LOG_LEVEL": "warning"},
    "deepspeed on a CPU": {"DS_ACCELERATOR": "cpu"},  # else it takes a GPU that torch cannot use
    # vLLM picks the connector by this variable; every media URL of the HTTP API then passes through ours.
    "vllm": {"VLLM_MEDIA_CONNECTOR": "nvila"},
    # Texts of a sample are short: threads that share them take seven times as long where others want the processors.
    "tokenizers in one thread": {"TOKENIZERS_PARALLELISM": "false"},
}


def before_importing(library: str, also: Mapping[str, str] | None = None) -> None:
    """Set what the library reads from this process's variables only, and `also` these; what is set already stays."""
    settle()
    for name, value in {**_LIBRARIES[library], **(also or {})}.items():
        os.environ.setdefault(name, value)


def take_over(variables: Mapping[str, str]) -> None:
    """Make these this process's own: a forked step has its task's variables, as a new interpreter would."""
    os.environ.clear()
    os.environ.update(variables)


def values_where(wanted: Callable[[str], bool]) -> set[str]:
    """Values of all variables, ours or not, whose name is wanted: secrets that no text may show."""
    return {value for name, value in os.environ.items() if wanted(name)}
