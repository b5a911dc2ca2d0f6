"""Recipe section `prune`: which of the SFT data stays; paper section 2.3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from nvila.components.contracts.recipe.model import DecoderSizes
from nvila.components.contracts.recipe.section import (
    MOST_ENTRIES,
    Batch,
    Disagreement,
    Name,
    Passes,
    Questions,
    Rate,
    Section,
    Share,
    Weights,
)

Method = Literal["deltaloss", "multimodal-gain", "clusters", "random", "none"]
"""How samples are ranked within their group."""
JUDGED: tuple[Method, ...] = ("deltaloss", "multimodal-gain")
"""Methods whose scores come of reference models, which have to prove themselves first."""
READ_BY: dict[str, tuple[Method, ...]] = {
    "small": ("deltaloss",),
    "large": JUDGED,
    "score": JUDGED,
    "untrusted": JUDGED,
    "heldout_questions": JUDGED,
    "vision_clusters": ("clusters",),
}
"""The settings that not every method reads."""
FIELD = "field:"
"""What stands before the name of a record's own field in `within`."""


class Reference(Section):
    """A reference VLM: a checkpoint, or (tiny recipes) one trained here per fold so that it never scores its own."""

    path: Weights | None = None
    """A trained VLM: a folder, `s3://` URI, `hf://id@revision`, or `NAME@ALIAS` or `NAME/NUMBER` of the registry (a
    folder of such a name begins with `./`); None trains one, projector and decoder, on the tower of `initialize`."""
    engine: Literal["torch", "vllm"] = "torch"
    """What computes its losses: `vllm` reads them off `prompt_logprobs` of a serving folder."""
    decoder: DecoderSizes = DecoderSizes()
    """Of one that is trained here."""
    epochs: Passes = 2.0
    """Passes over the other fold's SFT samples."""
    caption_epochs: float = Field(default=0.0, ge=0, le=1000)
    """Passes over the captions of the other fold's pictures, before the SFT samples."""
    learning_rate: Rate = 2e-3
    """Peak of the cosine schedule of one that is trained here."""
    batch: Batch = 64
    """Samples of an optimizer step of one that is trained here."""

    def disagreements(self) -> Iterator[Disagreement]:
        """vLLM reads a checkpoint."""
        if self.engine == "vllm" and self.path is None:
            yield Disagreement("engine", "engine: vllm scores with a checkpoint; name it in `path`")


class PruneSettings(Section):
    """What stays in the SFT mixture."""

    method: Method = "deltaloss"
    """`deltaloss`: loss of the small reference less that of the large one. `multimodal-gain`: loss of the large
    reference without the picture less that with it. `clusters`: k-means over vision features, as many of each.
    `random`. `none`: everything stays."""
    compare: list[Method] = Field(default=[], max_length=5)
    """Methods whose scores are worked out as well and stand in the table beside those of `method`."""
    keep_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of each group that stays: the ceil(keep_ratio * n) samples that rank highest."""
    keep_ratio_of: dict[Name, Annotated[float, Field(gt=0, le=1)]] = Field(default={}, max_length=MOST_ENTRIES)
    """Keep ratio of single sources by name, where it differs."""
    within: list[Name] = Field(default=[], max_length=16)
    """What a group shares besides its source: `answer-kind` (yes/no, number, word, phrase, text), `answer` (the very
    answer, of the commonest 50), `question` (a cluster of questions), `field:NAME` (a field of the record)."""
    question_clusters: int = Field(default=8, ge=2, le=1000)
    """Of each source, for `question`."""
    vision_clusters: int = Field(default=64, ge=2, le=10000)
    """Of each source, for the method `clusters`."""
    score: Literal["sum", "mean"] = "sum"
    """Losses summed or averaged over answer tokens; the paper leaves it open, and the table holds both."""
    untrusted: Literal["keep", "random"] = "keep"
    """What becomes of a kind of question in which the references prove nothing: it stays whole, or a random share of
    it does."""
    largest_shift: Share = 0.1
    """How far pruning may move a source's composition: the share of samples (total variation distance) by which the
    answers, kinds, lengths or resolutions that stay differ from those before."""
    on_shift: Literal["warn", "refuse"] = "warn"
    """Whether a larger shift is told or ends the run."""
    heldout_questions: Questions = 300
    """Held-out questions of each kind at most, on which the references are judged."""
    gpus: int = Field(default=1, ge=1, le=256)
    """Of one node, on which references are trained and shards scored side by side; where there is none, every core is
    used."""
    small: Reference = Reference()
    """The reference that DeltaLoss subtracts from."""
    large: Reference = Reference()
    """The reference whose loss counts in every method that has one."""

    def disagreements(self) -> Iterator[Disagreement]:
        """Groups are made of known parts, each once."""
        for index, part in enumerate(self.within):
            if part not in ("answer-kind", "answer", "question") and not (part.startswith(FIELD) and part != FIELD):
                yield Disagreement(f"within.{index}", f"none of answer-kind, answer, question, {FIELD}NAME", part)
            elif part in self.within[:index]:
                yield Disagreement(f"within.{index}", "it stands there twice", part)

    @property
    def methods(self) -> set[Method]:
        """Those whose scores are worked out."""
        return {self.method, *self.compare}

    @property
    def judged_by(self) -> Method:
        """The method in whose terms it is told whether references are trusted: the recipe's, or a compared one."""
        asked = [method for method in (self.method, *JUDGED) if method in JUDGED and method in self.methods]
        return asked[0] if asked else self.method

    @property
    def references(self) -> dict[str, Reference]:
        """Those that the methods ask, by name."""
        small = {"small": self.small} if "deltaloss" in self.methods else {}
        return small | ({"large": self.large} if self.methods.intersection(JUDGED) else {})

    @property
    def processes(self) -> int:
        """GPUs that the work can use: none where no model is asked."""
        return self.gpus if self.methods.intersection((*JUDGED, "clusters")) else 0

    @property
    def idle(self) -> list[str]:
        """What is set and takes no effect; where everything stays that is all of it, and may stand for another time."""
        if self.methods == {"none"}:
            return []
        unread = {name for name, methods in READ_BY.items() if not self.methods.intersection(methods)}
        unread |= set() if "question" in self.within else {"question_clusters"}
        return sorted(name for name in unread if getattr(self, name) != type(self).model_fields[name].default)

    @property
    def blank(self) -> bool:
        """Whether the large reference is asked about every sample without its picture as well."""
        return "multimodal-gain" in self.methods
