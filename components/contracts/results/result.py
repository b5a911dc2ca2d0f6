"""What every result has in common, and the one form of a measured value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Result(BaseModel):
    """What a step found out, small enough for its manifest: no times and no paths of one execution."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants", use_attribute_docstrings=True
    )


class Other(Result):
    """Of a step that this version does not know: as it was written."""

    model_config = ConfigDict(extra="allow")


class Measured(Result):
    """One measured value with its 95% interval, wherever it is told: manifest, summary.json, webhook, report."""

    model_config = ConfigDict(allow_inf_nan=False)

    metric: str
    """What was measured, by its name in `metrics`: `accuracy` is the share of exact matches."""
    value: float
    low: float
    high: float
    n: int
    """How often: of how many questions, say."""


class SkippedRecords(Result):
    """Records that a step could not use."""

    records: int = 0
    first: list[str] = Field(default_factory=list)
    """Some of them, each with its reason."""
