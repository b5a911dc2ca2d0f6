"""What the steps tell that make a model or choose its data."""

from __future__ import annotations

from typing import Any

from nvila.components.contracts.results.result import Result, SkippedRecords


class Validation(Result):
    """Of `validate`."""

    records: dict[str, dict[str, int]]
    """Good ones, by source and split."""
    quarantined: dict[str, int]
    """Spoilt ones, by reason."""
    media_files: int
    media_digest: str
    """Over the names and digests of all media, wherever they lie."""


class Initialization(Result):
    """Of the step that makes the model which stage 1 starts from."""

    parameters: dict[str, int]
    """By part of the model."""
    weights: dict[str, dict[str, str]] | None = None
    """What was fetched, by part, or of a whole `model`; None of one made from nothing, which alone has what follows."""
    start: str | None = None
    """Where a whole model was taken from, as the recipe names it."""
    vocabulary: int | None = None
    label_pictures: int | None = None
    labels: int | None = None
    labels_from: str | None = None
    """What the tower's labels are made of: `labels`, or what stood in for them."""
    skipped: SkippedRecords | None = None
    tower_label_accuracy: float | None = None
    tower_steps: int | None = None


class Judged(Result):
    """The references on held-out questions of one kind: mean losses of an answer, in nats, and shares of answers that
    are right token by token."""

    n: int
    """Held-out questions."""
    loss: dict[str, float]
    """By reference (`small`, `large`), of the large one without the picture (`blank`), and of the commonest answers to
    the same question text (`question_only`)."""
    accuracy: dict[str, float]
    """By reference."""
    against: dict[str, float]
    """By what it is held against (`small`, `blank`, `question_only`): the lower end of the 95% interval of how much
    lower the loss of the large reference is, question by question. Those that the method asks for (`judge.AGAINST`)
    must be above 0."""
    trusted: bool
    why: str
    """In words, where it is not trusted."""


class PrunedGroup(Result):
    """One group of samples, which pruning parted by itself."""

    source: str
    n: int
    kept: int
    ranked_by: str
    """The method that ranked it: the recipe's, or what stands in where the references are not trusted."""
    kinds: list[str] = []
    """The kinds of question that its samples are of, by which references are judged."""
    mean_score: float | None = None
    """In nats, of the samples that have one."""


class Composition(Result):
    """What a source is made of in one respect: shares by value, of all samples and of those that stay."""

    before: dict[str, float]
    after: dict[str, float]
    shift: float
    """Total variation distance between the two."""
    chance: float = 0.0
    """How far a random choice of the same size shifts it on average."""


class PrunedSource(Result):
    """How pruning parted one source."""

    n: int
    kept: int
    composition: dict[str, Composition]
    """By respect: answers, answer kinds, answer lengths, resolutions."""
    categories: dict[str, int]
    """Samples by what the references say of them: too easy, both fail, distracting, informative."""
    examples: dict[str, list[str]]
    """Some sample ids of each category."""


class Pruning(Result):
    """Of `prune`."""

    sources: dict[str, PrunedSource]
    groups: dict[str, PrunedGroup] = {}
    judged: dict[str, Judged] = {}
    """By kind of question."""
    method: str = "none"
    score: str | None = None
    shifted: list[str] = []
    """What moved farther than the recipe allows, in words."""
    skipped: SkippedRecords = SkippedRecords()


class Fp8Products(Result):
    """Which Linears of a stage were multiplied in FP8, and by what."""

    backend: str
    """`torchao` or `transformer-engine`."""
    version: str
    scaling: str
    """How a scale is chosen: `tensorwise` or `rowwise` from the tensor itself, `delayed` from those before it, `block`
    for each block of it."""
    linears: dict[str, int]
    """How many have each name; `*` is the number of a block."""


class Training(Result):
    """Of a training stage."""

    stage: dict[str, Any]
    """The row of the stage table, as the recipe had it."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.stage.get("name", ""))

    methods: dict[str, str] = {}
    """How each part that is trained learns."""
    trained_parameters: dict[str, int] = {}
    """Of each such part, by its method."""
    adapter_bytes: int | None = None
    """Of the files of the adapters, which are merged into the model as well; None where there are none."""
    precision: str
    fp8: Fp8Products | None = None
    """What an FP8 precision was in this stage."""
    steps: int
    """Of the optimizer."""
    samples: int
    skipped: SkippedRecords
    final_loss: float | None
    """Mean over the last tenth; None where no step had a usable sample."""


class Quantization(Result):
    """Of `quantize`."""

    bytes_before: int
    """Of the same tensors in bf16."""
    bytes_after: int
    linears: dict[str, int]
    """How many Linears each scheme has."""
    method: str
    group_size: int
    calibration_samples: int
    skipped: SkippedRecords
