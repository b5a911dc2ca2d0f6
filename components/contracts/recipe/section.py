"""What every section of the recipe has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: immutable; an unknown key is an error, and so are numbers without a value (.inf, .nan)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
