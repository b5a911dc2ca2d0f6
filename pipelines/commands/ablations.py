"""The commands `nvila ablate`; what they do is in `commands.ablate`, imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvila.pipelines.commands.options import Override, Runs, Store, local

Jobs = Annotated[int | None, typer.Option(min=1, help="Cases side by side; one per core by default.")]

ablations = typer.Typer(help="Find out what pays, by leaving it out.", no_args_is_help=True, rich_markup_mode=None)


@ablations.command(name="prune")
def ablate_prune(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")] = "tiny-ablate",
    override: Override = None,
    methods: Annotated[
        str, typer.Option(help="Which methods, with commas between them; `random` is what the others are held against.")
    ] = "deltaloss,multimodal-gain,clusters,random",
    ratios: Annotated[
        str, typer.Option(help="Shares of the samples to keep, with commas between them.")
    ] = "0.5,0.3,0.1",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each case; with one nothing is tested.")] = 3,
    spoilt: Annotated[
        bool, typer.Option("--spoilt/--no-spoilt", help="Also with 30% of the answers replaced by another sample's.")
    ] = True,
    jobs: Jobs = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=local, help="JSON file to write, the page beside it; runs/bench/prune.json by default."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cases and an estimate; nothing is made.")
    ] = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Train on what each pruning method keeps, and on all data; test whether it beats chance.

    From one stage-3 model and one table of scores, the pruned stages are trained for every method, keep ratio and seed:
    for one epoch over each subset, and for equal steps. Held-out questions are asked after each stage. Then the same
    with spoilt answers. Finished cases stay in the store: after an interruption the same command goes on.

    Example: nvila ablate prune --dry-run
    """
    from nvila.pipelines.ablate.cases import Design
    from nvila.pipelines.commands.ablate import numbers, prune, words

    design = Design(words(methods), numbers(ratios, "--ratios"), seeds, spoilt)
    prune(recipe, override or [], design, jobs=jobs, out=out, runs=runs, store=store, dry_run=dry_run)


@ablations.command(name="spatial")
def ablate_spatial(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")] = "tiny-spatial",
    override: Override = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row; with one, rows are not compared.")] = 3,
    jobs: Jobs = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=local, help="JSON file to write, the page beside it; runs/bench/spatial.json by default."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cases; nothing is made.")] = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Scale, then compress, on a small model: the rows of the paper's table 1 at equal data.

    A model is made and trained for stages 1 to 4 for each row (plain; S2 with 2x2 and with 3x3 pooling; and that with
    the vision tower trained in stage 2) and each seed, and asked held-out questions. Finished cases stay in the store:
    after an interruption the same command goes on.

    Example: nvila ablate spatial --seeds 1
    """
    from nvila.pipelines.ablate.spatial import Experiment
    from nvila.pipelines.ablate.spatial_cases import Design
    from nvila.pipelines.commands.ablate import of_models

    places: dict[str, Path] = {"out": out or runs / "bench" / "spatial.json", "runs": runs, "store": store}
    of_models(Experiment, recipe, override or [], Design(seeds), jobs=jobs, dry_run=dry_run, **places)


@ablations.command(name="lr-ratio")
def ablate_ratio(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")] = "tiny-lr-ratio",
    override: Override = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each case; with one, ratios are not compared.")] = 3,
    full_rate: Annotated[
        float, typer.Option(help="Learning rate of a language model that learns in full; by adapters the recipe's.")
    ] = 5e-4,
    jobs: Jobs = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=local, help="JSON file to write, the page beside it; runs/bench/lr-ratio.json by default."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cases; nothing is made.")] = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
) -> None:
    """Fine-tune with the vision tower at 1, 1/5, 1/10 and 1/50 of the language model's rate: the paper's table 6.

    One model, made once, is tuned in its recipe's last stage by LoRA, QLoRA, layer norms and in full, at each ratio and
    seed, and asked held-out questions. Finished cases stay in the store: after an interruption the same command goes
    on.

    Example: nvila ablate lr-ratio --seeds 1
    """
    from nvila.pipelines.ablate.ratio import Experiment
    from nvila.pipelines.ablate.ratio_cases import Design
    from nvila.pipelines.commands.ablate import of_models

    design = Design(seeds, full_rate)
    places: dict[str, Path] = {"out": out or runs / "bench" / "lr-ratio.json", "runs": runs, "store": store}
    of_models(Experiment, recipe, override or [], design, jobs=jobs, dry_run=dry_run, **places)
