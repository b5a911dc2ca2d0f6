"""Recipe section `quantize`: W8A8 vision tower and W4A16 language model; paper section 2.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from nvila.components.contracts.recipe.evaluate import LEAST_QUESTIONS
from nvila.components.contracts.recipe.section import Disagreement, Questions, Section, Share


class QuantizeGate(Section):
    """How much accuracy quantization may cost."""

    max_loss: Share = 0.03
    """Largest fall of exact match per source: the 95% interval of the fall must end at or below it."""
    least_questions: Questions = LEAST_QUESTIONS
    """A source with fewer questions is refused."""

    @property
    def open(self) -> bool:
        """Whether every model passes that has been asked enough."""
        return self.max_loss == 1


class Scheme(Section):
    """Scheme of each part and calibration."""

    vision_tower: Literal["W8A8", "none"] = "W8A8"
    """8-bit weights and activations, or as it was trained."""
    llm: Literal["W4A16", "none"] = "W4A16"
    """4-bit weights, or as it was trained."""
    method: Literal["rtn", "gptq", "awq"] = "gptq"
    """How the 4-bit weights are found."""
    group_size: int = Field(default=128, ge=8, le=16_384)
    """Weights of a row that share a scale; it divides the input features of each layer of the language model."""
    smoothquant_alpha: Share = 0.3
    """Migration strength for the tower's LayerNorm -> Linear pairs; 0 switches it off."""
    calibration_samples: int = Field(default=128, ge=1, le=100_000)
    """Training samples whose activations are looked at; all of them lie in memory."""


class QuantizeSettings(Scheme):
    """The scheme, and how the quantized model is measured."""

    limit: Questions | None = None
    """Held-out questions per source for the quantized model; None takes the evaluation's."""
    through_vllm: bool = True
    """Evaluate through vLLM and our plugin; False (micro recipe) through the same weights dequantized in torch."""
    gate: QuantizeGate = QuantizeGate()
    """How much may be lost."""

    @property
    def scheme(self) -> Scheme:
        """How to quantize alone."""
        return self.part(Scheme)

    def disagreements(self) -> Iterator[Disagreement]:
        """Enough questions for the gate."""
        if self.limit and self.limit < self.gate.least_questions:
            why = f"the gate refuses sources with fewer than {self.gate.least_questions} questions (least_questions)"
            yield Disagreement("limit", why, self.limit)
