"""What every section of the recipe has in common: its manners, and the ranges that many options share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from nvila.components.contracts.places import Located

S = TypeVar("S", bound="Section")

MOST_CHARACTERS = 100
"""Of a name: it becomes part of a file's, which has at most 255 bytes, and of a metric's."""
MOST_ENTRIES = 256
"""Of a list or a table of names: more of them are a mistake, and no message could show them."""
Name = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
Folder = Annotated[str, Located(), Field(min_length=1, max_length=1000)]
"""Systems allow 4,096 bytes with all that lies in it; a message with it should still be read."""
Weights = Annotated[str, Located(version=True), Field(min_length=1, max_length=1000)]
"""A folder, an address, or a version of the registry."""
Share = Annotated[float, Field(ge=0, le=1)]
Passes = Annotated[float, Field(ge=1e-6, le=1000)]
"""Over data: fewer draw nothing of a million records, more would be a list of them that no memory holds."""
Rate = Annotated[float, Field(ge=1e-9, le=1)]
"""Of learning: below, bf16 weights do not move; above, no loss stays finite."""
Batch = Annotated[int, Field(ge=1, le=2**20)]
"""In samples: a million is far beyond what any optimizer gains by."""
Questions = Annotated[int, Field(ge=1, le=10**7)]
"""Ten million answers take one GPU months."""
Tokens = Annotated[int, Field(ge=8, le=2**20)]
"""Of a row: fewer hold no question with its answer; no Qwen2 has more positions."""


class Disagreement(NamedTuple):
    """Options that are each in range and do not go together."""

    option: str
    """The one that is best changed, dotted, from the section on."""
    why: str
    value: Any = None


class Section(BaseModel):
    """A part of the recipe: immutable; an unknown key is an error, and so are numbers without a value (.inf, .nan), and
    texts, true and false where a number is meant.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )

    def disagreements(self) -> Iterator[Disagreement]:
        """All options of it that do not go together."""
        yield from ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        errors = [
            InitErrorDetails(
                type=PydanticCustomError("disagreement", "{why}", {"why": found.why}),
                loc=tuple(int(part) if part.isdigit() else part for part in found.option.split(".") if part),
                input=found.value,
            )
            for found in self.disagreements()
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    def part(self, kind: type[S]) -> S:
        """The section of this kind that this one adds to, alone: a step must not see what it does not read."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})
