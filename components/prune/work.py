"""What the processes of a prune step do: train references, answer held-out questions, score shards. Each piece leaves a
sealed file, so that an interrupted step goes on with what is missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvila.components.contracts.children import die_with_parent, first_to_end, forking, how_ended
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.files import write_atomic
from nvila.components.contracts.manifest import describe_files
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.sealed import fault, write_record
from nvila.components.data.samples import Sample, read_limits, sample_batches, samples_of
from nvila.components.data.skipped import Skipped, Tally

if TYPE_CHECKING:
    from nvila.components.prune.scoring import Panel

SHARD_SAMPLES = 4096
T = TypeVar("T")


class Job(Section):
    """What every process of a step knows."""

    prune: PruneSettings
    sources: list[str]
    seed: int
    max_skipped_share: float
    samples: Path
    """The sample table."""
    base: Path
    """Native checkpoint whose tower and tokenizer references that are trained here start from, and which makes the
    features of `clusters`."""
    weights: dict[str, Path]
    """Checkpoints of references that have a path, by name."""
    clusters: bool
    """Whether the vision features are clustered."""
    folder: Path
    """Where pieces of work are left."""

    @property
    def served(self) -> dict[str, Path]:
        """Checkpoints of references that vLLM runs, by name."""
        return {name: self.weights[name] for name, one in self.prune.references.items() if one.engine == "vllm"}

    @property
    def here(self) -> dict[str, Path | None]:
        """Checkpoints of references that torch runs, by name; None is trained here."""
        return {name: self.weights.get(name) for name in self.prune.references if name not in self.served}

    @property
    def folds(self) -> list[int | None]:
        """Those whose samples different models score; None where one panel scores everything."""
        from nvila.components.prune.references import FOLDS

        return list(range(FOLDS)) if self.trained else [None] if self.here else []

    @property
    def trained(self) -> list[str]:
        """Names of references that are trained here."""
        return [name for name, folder in self.here.items() if folder is None]


def crew(tasks: Sequence[Callable[[], T]], ranks: int) -> list[T]:
    """Results of tasks that processes of their own work on, `ranks` side by side; none of them outlives this call.

    Each computes on its own GPU where there are some, else on one core.

    Raises:
        NvilaError: one of them was lost.
    """
    from nvila.components.model.device import start_method

    if not tasks:
        return []
    context, started = multiprocessing.get_context(start_method()), list[Any]()
    count = context.Value("i", 0)
    with ProcessPoolExecutor(
        min(len(tasks), ranks), context, initializer=_begin, initargs=(os.getpid(), count)
    ) as pool:
        try:
            with forking():
                made = pool.map(_call, tasks)
            started = multiprocessing.active_children()
            return list(made)
        except BrokenProcessPool:
            pool.shutdown()
            code = first_to_end(child.exitcode for child in started)
            raise NvilaError(
                f"a process of pruning {how_ended(code)}", do="Run again: it goes on with what is missing."
            ) from None
        except BaseException:
            # Leaving the pool waits for its processes, which may have minutes of work before them.
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def ranks_here(gpus: int) -> int:
    """Processes that work side by side: one for each of at most so many GPUs, or one per core where there is none."""
    import torch

    return min(gpus, torch.cuda.device_count()) if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def train(job: Job, fold: int, name: str) -> None:
    """Train a reference, unless it is there."""
    from nvila.components.prune.references import trained

    trained(name, job.prune.references[name], fold, job, _device())


def answer(job: Job, fold: int | None, samples: list[Sample]) -> dict[str, dict[str, tuple[float, bool]]]:
    """Losses of held-out questions and whether they were right, by reference and id; the large one without the picture
    too. Questions that cannot be used have none."""
    # By what is asked: an attempt on more or fewer cores parts the questions otherwise.
    asked = blake2b("\n".join(sample.id for sample in samples).encode(), digest_size=8).hexdigest()
    place = job.folder / "heldout" / f"{fold}-{asked}.json"

    def made() -> str:
        found: dict[str, dict[str, tuple[float, bool]]] = {}
        progress = Progress("references: held-out questions", len(samples))
        for scored in panel(job, fold).score(samples, blind="large"):
            for name, losses in scored.losses.items():
                found.setdefault(name, {}).update({one: (loss.nats, loss.right) for one, loss in losses.items()})
            progress.update(len({one for losses in scored.losses.values() for one in losses}))
        return json.dumps(found)

    return {name: {one: tuple(loss) for one, loss in losses.items()} for name, losses in _piece(place, made).items()}


def score(job: Job, rank: int, ranks: int, wanted: Path, centres: dict[str, Any]) -> list[Path]:
    """Score every `ranks`-th shard of the samples, from `rank`; the files of the shards, in their order.

    Args:
        job: of the step.
        rank: which shards are this process's: `rank`, `rank + ranks`, ...
        ranks: how many processes share the shards.
        wanted: (n,) bool as a NumPy file: samples whose kinds the references are believed in.
        centres: k-means centres by source, where clusters are wanted.
    """
    import numpy as np

    believed = np.load(wanted, mmap_mode="r")
    limits, places = read_limits(job.samples), []
    tally = Tally("scores", len(believed), job.max_skipped_share, quiet=True)
    progress = Progress("scores", len(believed) // ranks)
    for index, rows in enumerate(sample_batches(job.samples, SHARD_SAMPLES, split="sft", sources=job.sources)):
        if index % ranks != rank:
            continue
        place = job.folder / "shards" / f"{index:06d}.json"
        mine = believed[index * SHARD_SAMPLES : index * SHARD_SAMPLES + len(rows)]
        _piece(place, partial(_shard, job, samples_of(rows, limits), mine, centres, tally, progress))
        places.append(place)
    return places


def read_shard(place: Path) -> dict[str, Any]:
    """What `score` wrote of a shard: `losses` by reference and id, `skipped`, `clusters` by id."""
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def centres(job: Job) -> dict[str, Any]:
    """(k, C) k-means centres of the vision features of each source."""
    import numpy as np

    from nvila.components.prune.clusters import fit, media_to_fit

    limits = read_limits(job.samples)

    def made(source: str) -> str:
        rows = sample_batches(job.samples, SHARD_SAMPLES, split="sft", sources=[source])
        chosen = media_to_fit(sample for batch in rows for sample in samples_of(batch, limits))
        return json.dumps(fit(features(job, chosen), job.prune.vision_clusters, job.seed).tolist())

    # Shards that are there already name clusters by their numbers: a later attempt must not make others.
    pieces = {
        source: _piece(job.folder / "centres" / f"{source}.json", partial(made, source)) for source in job.sources
    }
    return {source: np.array(piece, dtype=np.float32) for source, piece in pieces.items()}


def features(job: Job, samples: list[Sample]) -> Any:
    """(n, C) vision features of samples' media."""
    from nvila.components.model.feed import Feed
    from nvila.components.prune.clusters import pooled

    model, tokenizer = _base(job.base, _device())
    return pooled(model, Feed(tokenizer, model.config), samples)


def _shard(
    job: Job, samples: list[Sample], believed: Sequence[bool], centres: dict[str, Any], tally: Tally, progress: Progress
) -> str:
    from nvila.components.prune.clusters import nearest
    from nvila.components.prune.references import fold_of

    losses: dict[str, dict[str, tuple[float, int]]] = {}
    skipped: list[Skipped] = []
    clusters: dict[str, int] = {}
    scored = [sample for sample, fine in zip(samples, believed, strict=True) if fine]
    blind = "large" if job.prune.blank else None
    for fold in job.folds if scored else ():
        mine = [sample for sample in scored if fold is None or fold_of(sample) == fold]
        for some in panel(job, fold).score(mine, blind):
            for name, found in some.losses.items():
                losses.setdefault(name, {}).update({one: (loss.nats, loss.tokens) for one, loss in found.items()})
            skipped += some.skipped
            progress.update(len({one for found in some.losses.values() for one in found}))
    tally.add(skipped)
    for source, means in centres.items():
        of = [sample for sample in samples if sample.source == source]
        if of:
            places = nearest(features(job, of), means).tolist()
            clusters |= dict(zip((sample.id for sample in of), places, strict=True))
    return json.dumps(
        {"losses": losses, "skipped": [[one.id, one.reason, one.where] for one in skipped], "clusters": clusters}
    )


@cache
def _panels(key: str, fold: int | None) -> Panel:
    from nvila.components.prune.references import trained
    from nvila.components.prune.scoring import Panel

    job, device = Job.model_validate_json(key), _device()
    models = {}
    for name, at in job.here.items():
        if at is None:
            assert fold is not None
            at = trained(name, job.prune.references[name], fold, job, device)
        models[name] = _reference(at, device)
    return Panel(models)


@cache
def _reference(at: Path, device: str) -> tuple[Any, Any]:
    """A checkpoint that scores several folds is in memory once."""
    from nvila.components.model.checkpoint.loading import load

    # In bfloat16 a loss depends on what else is in the batch, by about a hundredth.
    return load(at, dtype="bfloat16" if device.startswith("cuda") else "float32", device=device)


def panel(job: Job, fold: int | None) -> Panel:
    """The references that score a fold; a process loads them once."""
    return _panels(job.model_dump_json(), fold)


@cache
def _base(folder: Path, device: str) -> tuple[Any, Any]:
    from nvila.components.model.checkpoint.native import load_native

    model, tokenizer = load_native(folder, device=device)
    return model.eval(), tokenizer


def _piece(place: Path, made: Callable[[], str]) -> Any:
    """The JSON at `place`, written now unless it is there as it was written."""
    record = place.with_suffix(".sealed")
    if fault(place.parent, record) is not None:
        write_atomic(place, made())
        write_record(record, describe_files(place.parent, [place.name]))
    return json.loads(place.read_text(encoding="utf-8"))


_RANK = 0


def _begin(parent: int, count: Any) -> None:
    """First thing in a process: it ends at once when it is told to, or when the step ends."""
    global _RANK
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)
    with count.get_lock():
        _RANK, count.value = count.value, count.value + 1
    import torch

    torch.set_num_threads(1)


def _call(task: Callable[[], T]) -> T:
    return task()


def _device() -> str:
    import torch

    from nvila.components.model.device import default_device

    return default_device(_RANK % max(1, torch.cuda.device_count()))
