"""The command line `nvila`. Each command imports what it needs when it runs, so that `--help` is immediate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from nvila.components.contracts.environment import Environment, entered, notices
from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.text import say, visible_lines
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.ablations import ablations
from nvila.pipelines.commands.gc import gc
from nvila.pipelines.commands.options import CaCert, Host, Json, Model, Override, Runs, Store, TokenFile, local
from nvila.pipelines.commands.rollouts import rollback, rollouts
from nvila.pipelines.commands.runs import logs, status
from nvila.pipelines.show.as_json import put, wanted
from nvila.pipelines.show.as_json import run as run_for_programs

app = typer.Typer(
    help="NVILA: from a recipe to a validated, trained, quantized and served vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    """Of this package and of what it stands on."""
    if asked:
        from nvila.pipelines.show.versions import lines

        typer.echo(lines())
        raise typer.Exit


@app.callback()
def _all(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Tell versions.")
    ] = False,
) -> None:
    """Options of every command."""
    for line in notices():
        say(line)
    context.obj = context.with_resource(entered(Environment.read()))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe (micro, tiny, ...) or path of a YAML file.")],
    override: Override = None,
    profile: Annotated[
        str, typer.Option(metavar="STAGE", help="Profile a few optimizer steps of this stage (train-4), or of all.")
    ] = "",
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Run a recipe on this machine: the whole lifecycle, or fine-tuning where it starts from a whole model.

    Exit code: 0 done, 2 wrong input, 3 rejected by a gate, 75 stopped (the same command resumes), 1 a fault. --json
    prints what summary.json holds.

    Example: nvila run tiny --override prune.keep_ratio=0.3
    """
    from nvila.pipelines.local.run import run as run_locally

    summary = run_locally(recipe, override or [], runs=runs, store=store, profile=profile)
    if as_json:
        put(summary.model_dump(mode="json"))
    raise typer.Exit(int(summary.exit_code))


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe (finetune, ...) or path of a YAML file.")],
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Model to start from: a folder, s3://bucket/prefix, hf://id@revision, NAME@ALIAS, NAME/NUMBER, or an "
            "alias of the newest registered model; the recipe's by default.",
        ),
    ] = "",
    override: Override = None,
    vision_rate_ratio: Annotated[
        float | None,
        typer.Option(help="The vision tower's learning rate as a share of the stage's (0.1); the recipe's by default."),
    ] = None,
    profile: Annotated[
        str, typer.Option(metavar="STAGE", help="Profile a few optimizer steps of this stage (train-1), or of all.")
    ] = "",
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Fine-tune a registered or published model on your own data, and hold it against what it was.

    The same steps as `nvila run`, without pruning and with up to three stages; files, resuming and exit codes are the
    same. On a cluster: `nvila submit RECIPE --from MODEL`.

    Example: nvila finetune tiny-finetune --from champion
    """
    from nvila.pipelines.commands.finetune import start_from, with_ratio
    from nvila.pipelines.local.run import run as run_locally

    model = start_from(start, runs)
    overrides = with_ratio(recipe, override or [], vision_rate_ratio, model)
    places = {"runs": runs, "store": store}
    summary = run_locally(recipe, overrides, profile=profile, start_from=model, wanted="finetune", **places)
    if as_json:
        put(summary.model_dump(mode="json"))
    raise typer.Exit(int(summary.exit_code))


@app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Override = None,
    as_json: Json = False,
    store: Store = Path("store"),
) -> None:
    """Check a recipe's data, and nothing else: every record and medium, by the rules of a run.

    Shows how many are good, why others are not, and where quarantine and data docs lie. A later run finds the work in
    the store. Exit code: 0, or 2 where a run would be stopped.

    Example: nvila validate mine.yaml
    """
    from nvila.pipelines.commands.validate import check, render, told

    checked = check(recipe, override or [], store)
    if as_json:
        put(told(checked))
    else:
        typer.echo(tell(render(checked)))
    if checked.error:
        raise checked.error


recipes = typer.Typer(help="Look at recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes, name="recipe")


@recipes.command(name="list")
def list_() -> None:
    """Name the shipped recipes.

    Example: nvila recipe list
    """
    from nvila.pipelines.commands.recipes import listing

    typer.echo(listing())


@recipes.command()
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Override = None,
) -> None:
    """Print a whole recipe as YAML, with where each value comes from.

    That is a recipe or file by its name, `--override`, or `default` for what none of them says. What is printed is a
    recipe itself, which extends nothing.

    Example: nvila recipe show nvila-15b --override train.zero=2
    """
    from nvila.pipelines.commands.recipes import show as whole

    typer.echo(tell(whole(recipe, override or [])))


@recipes.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: nvila recipe schema
    """
    from nvila.pipelines.commands.schema import as_text

    typer.echo(as_text())


@app.command(name="compile")
def compile_(
    out: Annotated[Path, typer.Argument(callback=local, help="YAML file to write.")] = Path("lifecycle.yaml"),
    image: Annotated[str, typer.Option(help="Container image of the steps, pinned by digest if you can.")] = "",
    quantize_image: Annotated[
        str, typer.Option(help="Image of the steps that use vLLM: the first one, and vLLM.")
    ] = "",
    pipeline: Annotated[
        Literal["lifecycle", "finetune"], typer.Option(help="Which: finetune starts from a whole model.")
    ] = "lifecycle",
    format: Annotated[
        Literal["pipeline", "manifests"],
        typer.Option(help="pipeline: a file for the UI. manifests: Pipeline and PipelineVersion resources."),
    ] = "pipeline",
) -> None:
    """Write a pipeline for a Kubeflow cluster.

    Example: nvila compile lifecycle.yaml --image R/base@sha256:... --quantize-image R/quantize@sha256:...
    """
    from nvila.pipelines.compile.package import compile_pipeline

    images = {"image": image, "quantize_image": quantize_image}
    given = {option: name for option, name in images.items() if name}
    size = compile_pipeline(out, **given, pipeline=pipeline, format=format)
    typer.echo(f"{out}: {size / 1024:.0f} KiB")
    if not given:
        typer.echo("its images are placeholders: name yours with --image and --quantize-image", err=True)


@app.command()
def plan(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.", show_default=False)
    ] = "",
    override: Override = None,
    gpu: Annotated[str, typer.Option(help="GPU to count with: a100, l4, 4090, l40s, h100, h200 or b200.")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of the GPU's stated speed that training reaches.")] = 0.3,
    gpu_hour_price: Annotated[float, typer.Option(help="Price of one GPU for an hour.")] = 2.5,
    samples: Annotated[
        list[str] | None, typer.Option(help="SOURCE.SPLIT=NUMBER where the data are not here; repeatable.")
    ] = None,
    cluster: Annotated[
        bool | None, typer.Option(help="Look at the cluster of KUBECONFIG; by default where there is one.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace there; the context's by default.")] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Show the table of the training stages instead, and what follows from it.")
    ] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Tell the largest micro batch of each stage; measured where a GPU is here."),
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Show which ways of training go together; needs no recipe.")
    ] = False,
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Show what a run would do, need and cost, and what it would be refused for; nothing is made.

    Exit code 2 when the run would be refused: by the cluster where there is one, else by this machine.

    Example: nvila plan nvila-lite-2b --gpu h200 --samples images.captions=1000000
    """
    from rich.console import Console

    if matrix:
        from nvila.pipelines.planning import matrix as combinations

        if as_json:
            put(combinations.as_json())
        else:
            combinations.show(Console(width=150))
        return
    if not recipe:
        raise typer.BadParameter("name one, such as tiny", param_hint="RECIPE")
    from nvila.pipelines.planning import plan as planning
    from nvila.pipelines.planning.checks import configured

    if stages:
        from nvila.pipelines.planning import stages as staging

        rows = staging.table(recipe, override or [], planning.parse_samples(samples or []), runs)
        if as_json:
            put(staging.as_json(rows))
        else:
            staging.show(recipe, rows, Console(width=140))
        return
    found = None if cluster is False else configured(context.obj.kubeconfig, namespace)
    if cluster and found is None:
        raise ConfigError("no cluster is configured", where="--cluster", do="Set KUBECONFIG to a file that is there.")
    assumed = planning.assumptions_of(gpu, mfu, gpu_hour_price)
    places = {"runs": runs.absolute(), "store": store.absolute()}
    sizes = planning.parse_samples(samples or [])
    made = planning.make_plan(
        recipe, override or [], assumed, sizes, **places, cluster=found, insist=bool(cluster), fit=fit
    )
    if as_json:
        put(planning.as_json(made))
    else:
        planning.show(made, Console(width=140))  # a narrow terminal would cut numbers off
    raise typer.Exit(int(planning.exit_code(made)))


fp8 = typer.Typer(help="Training with products of matrices in FP8.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(fp8, name="fp8")


@fp8.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    override: Override = None,
    gpu: Annotated[
        str, typer.Option(help="GPU for the bound where none is here, and for the memory: l40s, h100, h200 or b200.")
    ] = "h100",
    as_json: Json = False,
) -> None:
    """Tell what FP8 gains in each stage, Linear by Linear, what stays in bf16 and why, and what fits then.

    Measured on this machine's GPU; on its CPU for recipes that do without a GPU; else a bound from the GPU's stated
    speeds, marked as one. A recipe in another precision is looked at as if it said fp8-current.

    Example: nvila fp8 doctor nvila-8b --gpu h100
    """
    from rich.console import Console

    from nvila.pipelines.planning import doctor as doctoring

    found = doctoring.diagnose(recipe, override or [], gpu)
    if as_json:
        put(doctoring.as_json(found))
    else:
        doctoring.show(found, Console(width=180))


@app.command()
def submit(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.", show_default=False)
    ] = "",
    host: Host = "",
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    namespace: Annotated[str | None, typer.Option(help="Your namespace, where the server has several users.")] = None,
    experiment: Annotated[str, typer.Option(help="Experiment that the run belongs to; made when missing.")] = "nvila",
    run_name: Annotated[str | None, typer.Option(help="Name of the run; recipe and time by default.")] = None,
    service_account: Annotated[str | None, typer.Option(help="Service account of the step pods.")] = None,
    override: Override = None,
    start_from: Annotated[
        str, typer.Option("--from", metavar="MODEL", help="Model to fine-tune, as the cluster names it.")
    ] = "",
    data_uri: Annotated[str, typer.Option(help="Folder with one folder per source, on the shared volume.")] = "",
    model_name: Annotated[str, typer.Option(help="Name in the registry; the recipe's by default.")] = "",
    target: Annotated[
        str,
        typer.Option(help="kubernetes or none; the recipe's by default, none where that serves on its own machine."),
    ] = "",
    image: Annotated[
        str, typer.Option(help="Upload the pipeline of this checkout with this image, instead of the installed one.")
    ] = "",
    quantize_image: Annotated[str, typer.Option(help="Like that of `nvila compile`; goes with --image.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Show the steps until the run ends; its exit code.")] = False,
    upload_only: Annotated[
        bool, typer.Option("--upload-only", help="Upload both pipelines, start nothing; needs --image.")
    ] = False,
) -> None:
    """Start a run on a Kubeflow cluster: of the lifecycle, or of fine-tuning where the recipe starts from a model.

    Exit code: 0 started, 2 wrong input, no access, or Kubeflow is away. With --wait that of the run: 0 done, 2 wrong
    input, 3 rejected by a gate, 75 stopped or cancelled, or left to go on, 1 a fault. HTTP_PROXY, HTTPS_PROXY and
    NO_PROXY are obeyed.

    Example: nvila submit nvila-lite-2b --host https://kubeflow.example/pipeline --namespace ada --wait
    """
    from rich.console import Console

    from nvila.components.contracts.pipelines import PIPELINES
    from nvila.pipelines.kubeflow.connection import Connection
    from nvila.pipelines.kubeflow.server import Server
    from nvila.pipelines.kubeflow.submit import Version, Wanted, namespace_of, upload
    from nvila.pipelines.kubeflow.submit import submit as start

    server = Server(Connection(host, context.obj, token_file=token_file, ca_cert=ca_cert))
    version, console = Version(image, quantize_image), Console()
    if upload_only:
        shared = namespace_of(server, namespace, shared=True)
        for name in PIPELINES:
            upload(server, version, shared, console, name)
        return
    wanted = Wanted(namespace, experiment, run_name, service_account)
    named = {"data_uri": data_uri, "model_name": model_name, "start_from": start_from, "target": target}
    raise typer.Exit(start(recipe, override or [], server, version, wanted, console, **named, wait=wait))


class _InOrder(typer.core.TyperCommand):
    """Remembers in which order pictures and clips were named: a list per option does not tell."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As usual, with the media options' names in their order in `ctx.meta`."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["media"] = [option.name for option in order if option.name in ("image", "video")]
        return super().parse_args(ctx, args)


@app.command(cls=_InOrder)
def infer(
    context: typer.Context,
    model: Model,
    question: Annotated[list[str], typer.Argument(help="What to ask; several are asked one after the other.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", callback=local, help="Picture, PDF or PDF#page=N; repeatable.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option("--video", callback=local, help="Clip, or folder of frames; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    system: Annotated[str | None, typer.Option(help="System prompt; the model's own by default.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    json_schema: Annotated[
        Path | None, typer.Option(callback=local, help="File with a JSON schema that each answer keeps.")
    ] = None,
    as_json: Json = False,
    runs: Runs = Path("runs"),
) -> None:
    """Ask a model about pictures and clips.

    Media stand before the first question in the order of their options, or where `<image>` and `<vila/video>` are.
    Each page of a PDF is a picture. An answer that is cut before its JSON ends is an error (exit code 2).

    Example: nvila infer champion --image photo.jpg "What is in row 2, column 1?"
    """
    from nvila.pipelines.commands.ask import Answering, Question, whole
    from nvila.pipelines.commands.ask import infer as answer

    named = {"image": iter(image or []), "video": iter(video or [])}
    media = [(kind, next(named[kind])) for kind in context.meta["media"]]
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    pieces = answer(model, Question(question, media, system), Answering(max_new_tokens, options, json_schema), runs)
    if as_json:
        put({"answers": whole(pieces)})
        return
    for piece in pieces:
        text = "\n" if piece is None else piece
        typer.echo(visible_lines(text) if sys.stdout.isatty() else text, nl=False)


@app.command()
def convert(
    source: Model,
    target: Annotated[Path, typer.Argument(callback=local, help="New folder to write.")],
    to: Annotated[str, typer.Option("--to", help="Layout to write: native, vila, hf or serving.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default, bfloat16 for serving.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write a checkpoint in another layout, in little memory; the same command resumes after an interruption.

    Example: nvila convert hf://Efficient-Large-Model/NVILA-Lite-2B@main lite-2b --to hf
    """
    from nvila.pipelines.commands.checkpoints import convert as run_conversion

    typer.echo(tell(run_conversion(source, target, to, dtype, runs)))


@app.command()
def inspect(
    source: Model,
    as_json: Json = False,
    runs: Runs = Path("runs"),
) -> None:
    """Show a checkpoint's variant, parameters, visual tokens and memory.

    Example: nvila inspect hf://Efficient-Large-Model/NVILA-8B@main
    """
    from nvila.pipelines.commands.checkpoints import inspect as look

    described, text = look(source, runs)
    if as_json:
        put(described)
    else:
        typer.echo(tell(text))


@app.command()
def serve(
    context: typer.Context,
    model: Model = "champion",
    host: Annotated[str, typer.Option(help="Address to listen on; `::1` and `0.0.0.0` are some.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8321,
    name: Annotated[str | None, typer.Option(help="What requests call the model; its own name by default.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="key=value of the recipe's section rollout.endpoint, such as media_domains=a,b; repeatable.",
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, as in a container; SIGTERM gives the last answers and ends it.")
    ] = False,
    version: Annotated[
        str | None, typer.Option(help="With --foreground: number in the registry of what the folder holds.")
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(help="With --foreground: host:port of the endpoint that is asked what this one fails to answer."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="With --foreground: port where it tells of itself: /metrics, /health."),
    ] = None,
    as_json: Json = False,
    runs: Runs = Path("runs"),
) -> None:
    """Start the endpoint of a model and wait until it answers.

    Example: nvila serve champion --port 8321
    """
    from nvila.pipelines.commands.endpoint import Foreground
    from nvila.pipelines.commands.endpoint import serve as start

    stays = Foreground.of(foreground, version=version, fallback=fallback, metrics_port=metrics_port)
    served = start(model, host, port, runs, context.obj.api_key, name=name, options=option or [], foreground=stays)
    if served is None:
        return
    one = served.of("champion")
    if as_json:
        told = (
            {"model": one.version.name, "version": one.version.version, "pid": one.pid, "log": one.log} if one else {}
        )
        put({"url": served.url} | told)
    else:
        typer.echo(tell(f"serving at {served.url}; `nvila status` tells of it, `nvila stop` ends it"))


app.command()(status)
app.command()(logs)
app.command()(rollouts)
app.command()(rollback)
app.command()(gc)
app.add_typer(ablations, name="ablate")


@app.command()
def stop(as_json: Json = False, runs: Runs = Path("runs")) -> None:
    """Stop the endpoint that a run or `nvila serve` has started, and what is left of one that was killed.

    Example: nvila stop
    """
    from nvila.pipelines.commands.endpoint import stop as end

    stopped = end(runs)
    if as_json:
        put({"stopped": stopped})
    else:
        typer.echo(tell(f"stopped {', '.join(stopped)}") if stopped else "no endpoint was running")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    runs: Runs = Path("runs"),
) -> None:
    """Show the runs and the model registry of a folder in MLflow, on 127.0.0.1, until it is interrupted.

    Example: nvila ui --runs /data/runs
    """
    from nvila.pipelines.commands.ui import serve as start

    raise typer.Exit(start(runs, port))


@app.command()
def trace(
    model: Model = "champion",
    deep: Annotated[bool, typer.Option("--deep", help="Read every file and medium, not only sizes.")] = False,
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Walk from a registered model back to the source files it was made from.

    Exit code 1 when a manifest or a file on the way is missing or is not what was recorded. Without --deep a file of
    the store counts by its size, and pictures and clips are not looked at.

    Example: nvila trace champion
    """
    from nvila.components.tracking.trace import render, told
    from nvila.components.tracking.trace import trace as walk

    tree = walk(store.absolute(), model, runs=runs.absolute(), deep=deep)
    if as_json:
        put(told(tree))
    else:
        typer.echo(tell(render(tree)))
    raise typer.Exit(int(Exit.DONE if tree.unchanged else Exit.FAULT))


def main() -> None:
    """Entry point: our own errors are one line on stderr, with `--json` an object on stdout; and their exit code."""
    if wanted(sys.argv[1:]):
        raise SystemExit(run_for_programs(lambda: app(standalone_mode=False)))
    try:
        app()
    except NvilaError as error:
        if "--traceback" in sys.argv:
            raise
        print(tell(f"nvila: {error}"), file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
    except KeyboardInterrupt:
        raise SystemExit(int(Exit.PREEMPTED)) from None


if __name__ == "__main__":
    main()
