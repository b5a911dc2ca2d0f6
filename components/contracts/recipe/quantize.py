"""Recipe section `quantize`: W8A8 vision tower and W4A16 language model; paper section 2.5."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nvila.components.contracts.recipe.evaluate import LEAST_QUESTIONS
from nvila.components.contracts.recipe.section import Section


class QuantizeGate(Section):
    """How much accuracy quantization may cost."""

    max_loss: float = Field(default=0.03, ge=0, le=1)
    """Largest fall of exact match per source: the 95% interval of the fall must end at or below it."""
    least_questions: int = Field(default=LEAST_QUESTIONS, ge=1)
    """A source with fewer questions is refused."""


class Scheme(Section):
    """Scheme of each part and calibration."""

    vision_tower: Literal["W8A8", "none"] = "W8A8"
    llm: Literal["W4A16", "none"] = "W4A16"
    method: Literal["rtn", "gptq", "awq"] = "gptq"
    """How the 4-bit weights are found."""
    group_size: int = 128
    smoothquant_alpha: float = 0.3
    """Migration strength for the tower's LayerNorm -> Linear pairs; 0 switches it off."""
    calibration_samples: int = 128


class QuantizeSettings(Scheme):
    """The scheme, and how the quantized model is measured."""

    limit: int | None = Field(default=None, ge=1)
    """Held-out questions per source for the quantized model; None takes the evaluation's."""
    through_vllm: bool = True
    """Evaluate through vLLM and our plugin; False (micro recipe) through the same weights dequantized in torch."""
    gate: QuantizeGate = QuantizeGate()

    @property
    def scheme(self) -> Scheme:
        """How to quantize alone."""
        return self.part(Scheme)
