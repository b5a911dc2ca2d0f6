"""Recipe section `train`: the table of the stages; paper section 3.1 and table 8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from nvila.components.contracts.precisions import PRECISIONS, Precision
from nvila.components.contracts.recipe.changes import ModelChanges
from nvila.components.contracts.recipe.matrix import Cell, Offload, Packing, Zero, refusals
from nvila.components.contracts.recipe.methods import ADAPTERS, METHODS, Lora, Method, Part
from nvila.components.contracts.recipe.section import (
    MOST_ENTRIES,
    Batch,
    Disagreement,
    Name,
    Passes,
    Rate,
    Section,
    Share,
    Tokens,
)


class Stage(Section):
    """One row of the stage table."""

    name: Name
    """What messages and the report call it."""
    trainable: list[Part] = Field(min_length=1, max_length=3)
    """Parts that learn; the others are frozen."""
    methods: dict[Part, Method] = Field(default={}, max_length=3)
    """How they learn. `full`, which is also of parts not named: all weights. `layernorm` (vision_tower): weights and
    biases of its layer norms alone. `lora`, `dora`, `qlora` (the last two llm alone): adapters beside frozen weights,
    which the end of the stage merges into them; under `qlora` these lie in four bits meanwhile."""
    lora: Lora = Lora()
    """Adapters of the parts that have some."""
    learning_rate: Rate
    """Peak of the cosine schedule."""
    learning_rates: dict[Part, Rate] = Field(default={}, max_length=3)
    """Peaks of trainable parts that have one of their own."""
    model: ModelChanges = ModelChanges()
    """What becomes of the model in this stage, for good."""
    data: dict[Name, Passes] = Field(min_length=1, max_length=MOST_ENTRIES)
    """`source.split` -> passes over it; 0.5 is half of it, 2 is twice."""
    pruned: bool = False
    """Take only what pruning kept of the SFT splits."""
    batch: Batch
    """Global batch, in samples."""
    micro_batch: Batch | None = None
    """Samples per forward pass and GPU; None is the global batch over the number of GPUs."""
    max_length_tokens: Tokens = 8192
    """Longer rows are cut; the model's own limit cuts as well."""
    clip_norm: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Longest gradient, by its norm; null clips none."""
    weight_decay: Share = 0.0
    """Share of a weight that a step of rate 1 takes away."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises; with all of them it would never fall."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, a third more work."""

    @property
    def tuned_on(self) -> list[str]:
        """Names of the sources whose `sft` split it draws."""
        return [source for source, _, split in (subset.partition(".") for subset in self.data) if split == "sft"]

    @property
    def adapted(self) -> list[Part]:
        """Parts that learn by adapters."""
        return [part for part in self.trainable if self.method(part) in ADAPTERS]

    @property
    def learning(self) -> dict[str, Method]:
        """Trainable parts, and how each learns."""
        return {part: self.method(part) for part in self.trainable}

    def method(self, part: Part) -> Method:
        """How a trainable part learns."""
        return self.methods.get(part, "full")

    def rate(self, part: Part) -> float:
        """Peak learning rate of a trainable part."""
        return self.learning_rates.get(part, self.learning_rate)

    def disagreements(self) -> Iterator[Disagreement]:
        """Parts stand there once, rates, methods and tokens are of parts that learn so, what is pruned is drawn."""
        if len(set(self.trainable)) != len(self.trainable):
            yield Disagreement("trainable", "a part stands there twice")
        for part in self.learning_rates:
            if part not in self.trainable:
                yield Disagreement(f"learning_rates.{part}", f"{part} is not trainable in this stage")
        yield from self._methods()
        if self.model.time_tokens and "llm" not in self.trainable:
            yield Disagreement("model.time_tokens", f"stage {self.name} does not train llm, which is to learn them")
        if self.model.time_tokens and "llm" in self.adapted:
            yield Disagreement(
                "model.time_tokens",
                f"llm learns by {self.method('llm')}: the rows of new tokens in the embeddings and the output layer"
                " have no adapters, and would stay as they are made; train llm in full",
            )
        if set(self.trainable) <= set(self.learning_rates):
            yield Disagreement("learning_rates", "each trainable part has its own: learning_rate would have no effect")
        if self.pruned and not self.tuned_on:
            yield Disagreement(
                "pruned", "pruned: true draws less of sft splits, and the stage's data has none; drop it"
            )

    def _methods(self) -> Iterator[Disagreement]:
        """Methods are of trainable parts that can learn so, and adapters and decay have some to act on."""
        for part, method in self.methods.items():
            if part not in self.trainable:
                yield Disagreement(f"methods.{part}", f"{part} is not trainable in this stage")
            if method not in METHODS[part]:
                yield Disagreement(f"methods.{part}", f"{part} learns by {' or '.join(METHODS[part])}", method)
        if self.lora != Lora() and not self.adapted:
            yield Disagreement("lora", "no part learns by lora, dora or qlora: it would have no effect; see methods")
        if self.weight_decay and set(self.learning.values()) == {"layernorm"}:
            yield Disagreement("weight_decay", "layer norms do not decay, and nothing else is trained")

    def samples_at_once(self, processes: int) -> int:
        """Samples per forward pass of each of so many processes.

        Raises:
            ValueError: they cannot share the global batch evenly.
        """
        micro = self.micro_batch or max(1, self.batch // processes)
        if self.batch % (micro * processes):
            raise ValueError(
                f"stage {self.name}: batch {self.batch} is not a multiple of micro_batch {micro} times {processes} gpus"
            )
        return micro


class Fp8(Section):
    """What an FP8 precision does; the others do not read it."""

    min_features: int = Field(default=3584, ge=16, le=2**20)
    """Least of both sizes of a Linear of the decoder that is multiplied in FP8; smaller ones gain nothing by it."""
    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    """Of fp8-current: a scale for each tensor, or for each row and column of it, which torchao does alone, also where
    Transformer Engine is installed."""


SHARED_OUT = {"stage": {"micro_batch", "gradient_checkpointing"}, "run": {"gpus"}}
"""How the work of a step lies on processes: a loss that is the mean over tokens does not see it, but for rounding."""
KEPT = {"checkpoint_seconds", "loader_processes", "loader_seconds", "keep_checkpoints", "keep_best"}
"""Fields of `Run` that no loss sees."""


class Run(Section):
    """How a stage is run."""

    precision: Precision = "bf16"
    """Of weights and products of matrices. fp8-current takes torchao where Transformer Engine is not installed; the
    others of FP8 are Transformer Engine's."""
    fp8: Fp8 = Fp8()
    """Which Linears an FP8 precision takes, and how they are scaled."""
    zero: Zero = 0
    """DeepSpeed ZeRO stage."""
    offload: Offload = "none"
    """Where the optimizer keeps its states and takes its step: beside the weights, or, with ZeRO 2 and 3, in the memory
    of the machine. Under ZeRO 3 the weights that no layer needs right now lie there too."""
    loss_weighting: Literal["token", "device_batch"] = "token"
    """What the loss of a global batch is the mean of: its supervised tokens, or the means of its micro batches, in
    which a token of a short answer weighs more (as in the reference)."""
    gpus: int = Field(default=1, ge=1, le=65_536)
    """Processes under torchrun (one per GPU; on a machine without one, CPU processes)."""
    checkpoint_seconds: float = Field(default=60.0, ge=0, le=7 * 86_400)
    """Longest time between two checkpoints of an unfinished stage; a week at most, or none would be written."""
    packing: Packing = "auto"
    """How the samples of a global batch share forward passes: rows of one sample in their order, or those of like
    length together, or rows of several samples, which do not see each other; auto takes the cheapest for their lengths.
    """
    loader_processes: int = Field(default=1, ge=1, le=256)
    """Processes that make samples ready for each training process."""
    loader_seconds: float = Field(default=1200.0, ge=1, le=1500)
    """How long 16 samples may take such a process; more is an error that names the one in hand."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    """Newest checkpoints of an unfinished stage that stay; where the last is damaged, the one before it serves."""
    keep_best: bool = True
    """Keep besides the checkpoint before which the loss was lowest."""
    bad_steps: Literal["stop", "skip"] = "stop"
    """What becomes of an optimizer step whose loss or gradient is not finite, or whose loss is a spike: it ends the
    stage, or it changes no weight and its samples are named and count for `max_skipped_share`."""
    spike_factor: float | None = Field(default=None, gt=1, le=1e6)
    """A loss is a spike above so many times the median of the 100 steps before; null: none is."""
    max_skipped_share: Share = 0.01
    """Share of a step's records, rounded up, that may turn out to be unusable (a medium that is gone or damaged, an
    answer that `max_length_tokens` cuts off whole): they are named and left out. More of them end the step."""

    @property
    def arranged(self) -> str:
        """`packing` as it is done: micro batches stay what they are where the loss is weighted by them."""
        return "padded" if self.loss_weighting == "device_batch" else self.packing

    @property
    def kernel(self) -> bool:
        """Whether a GPU has packed rows, by a kernel of half precision that knows where the samples of a row begin."""
        return self.arranged in ("auto", "packed") and PRECISIONS[self.precision].weights != "float32"


class TrainSettings(Run):
    """The stages and how they are run."""

    stages: list[Stage | None] = Field(min_length=1, max_length=64)
    """One per training step of the pipeline, in its order; null, or a list that ends earlier, leaves a step out."""

    @property
    def run(self) -> Run:
        """How they are run alone."""
        return self.part(Run)

    @property
    def pruned(self) -> set[str]:
        """Names of the sources of whose SFT split some stage takes only what pruning kept."""
        return {source for stage in self.stages if stage and stage.pruned for source in stage.tuned_on}

    def disagreements(self) -> Iterator[Disagreement]:
        """Processes share each stage's batch evenly, and what goes together is what the matrix allows."""
        yield from self._refusals()
        if self.loss_weighting == "device_batch" and self.packing not in ("auto", "padded"):
            yield Disagreement(
                "packing",
                f"loss_weighting: device_batch keeps micro batches as they are: {self.packing} would have no effect",
            )
        if self.fp8.scaling == "rowwise" and self.precision in ("fp8-delayed", "fp8-block"):
            yield Disagreement(
                "fp8.scaling", f"rowwise would have no effect: {self.precision} has a scaling of its own"
            )
        if not any(self.stages):
            yield Disagreement("stages", "no stage is left")
        for index, stage in enumerate(self.stages):
            try:
                _ = stage and stage.samples_at_once(self.gpus)
            except ValueError as error:
                yield Disagreement(f"stages.{index}.batch", str(error))

    def _refusals(self) -> Iterator[Disagreement]:
        """Each rule of the matrix that a stage breaks; of the stages' options at each of them, of others once."""
        told = set()
        for index, stage in enumerate(self.stages):
            learning = stage.learning if stage else {}
            cell = Cell.of(learning, self.zero, self.precision, self.offload, self.packing)
            for rule in refusals(cell):
                option = rule.option.replace("*", str(index))
                if option not in told:
                    told.add(option)
                    yield Disagreement(option, rule.why)
