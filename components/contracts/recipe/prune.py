"""Recipe section `prune`: which of the SFT data stays; paper section 2.3."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from nvila.components.contracts.recipe.model import DecoderSizes
from nvila.components.contracts.recipe.section import Section

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

    path: str | None = None
    """A trained VLM: a folder, `s3://` URI, `hf://id@revision`, or `NAME@ALIAS` or `NAME/NUMBER` of the registry (a
    folder of such a name begins with `./`); None trains one, projector and decoder, on the tower of `initialize`."""
    engine: Literal["torch", "vllm"] = "torch"
    """What computes its losses: `vllm` reads them off `prompt_logprobs` of a serving folder."""
    decoder: DecoderSizes = DecoderSizes()
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the other fold's SFT samples."""
    caption_epochs: float = Field(default=0.0, ge=0)
    """Passes over the captions of the other fold's pictures, before the SFT samples."""
    learning_rate: float = Field(default=2e-3, gt=0)
    batch: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _vllm_reads_a_checkpoint(self) -> Reference:
        if self.engine == "vllm" and self.path is None:
            raise ValueError("engine: vllm scores with a checkpoint; name it in `path`")
        return self


class PruneSettings(Section):
    """What stays in the SFT mixture."""

    method: Method = "deltaloss"
    """`deltaloss`: loss of the small reference less that of the large one. `multimodal-gain`: loss of the large
    reference without the picture less that with it. `clusters`: k-means over vision features, as many of each.
    `random`. `none`: everything stays."""
    compare: list[Method] = []
    """Methods whose scores are worked out as well and stand in the table beside those of `method`."""
    keep_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of each group that stays: the ceil(keep_ratio * n) samples that rank highest."""
    keep_ratio_of: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Keep ratio of single sources by name, where it differs."""
    within: list[str] = []
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
    largest_shift: float = Field(default=0.1, ge=0, le=1)
    """How far pruning may move a source's composition: the share of samples (total variation distance) by which the
    answers, kinds, lengths or resolutions that stay differ from those before."""
    on_shift: Literal["warn", "refuse"] = "warn"
    heldout_questions: int = Field(default=300, ge=1)
    """Held-out questions of each kind at most, on which the references are judged."""
    gpus: int = Field(default=1, ge=1)
    """Of one node, on which references are trained and shards scored side by side; where there is none, every core is
    used."""
    small: Reference = Reference()
    large: Reference = Reference()

    @field_validator("within")
    @classmethod
    def _known(cls, within: list[str]) -> list[str]:
        for part in within:
            if part not in ("answer-kind", "answer", "question") and not (part.startswith(FIELD) and part != FIELD):
                raise ValueError(f"{part!r} is none of answer-kind, answer, question, {FIELD}NAME")
        if len(set(within)) != len(within):
            raise ValueError("a part stands there twice")
        return within

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
