"""What every section of the recipe has in common."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of the recipe: immutable; an unknown key is an error, and so are numbers without a value (.inf, .nan)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def part(self, kind: type[S]) -> S:
        """The section of this kind that this one adds to, alone: a step must not see what it does not read."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})
