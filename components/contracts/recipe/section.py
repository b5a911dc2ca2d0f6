"""What every section of the recipe has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
