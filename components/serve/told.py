"""What the server's process is told beside vLLM's own options: the endpoint's settings, and which folder it serves."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nvila.components.contracts.environment import Environment, named
from nvila.components.contracts.recipe.endpoint import EndpointSettings


class Told(BaseModel):
    """Travels as JSON in a variable (`Environment.endpoint`); middleware and media connector read it there."""

    model_config = ConfigDict(frozen=True)

    model_dir: Path | None = None
    """The serving folder; None where vLLM was started without us."""
    settings: EndpointSettings = EndpointSettings()

    def variables(self) -> dict[str, str]:
        """For the server's process."""
        return named(endpoint=self.model_dump_json())

    @classmethod
    def read(cls) -> Told:
        """In the server's process; the defaults where nothing was said."""
        return cls.model_validate_json(text) if (text := Environment.read().endpoint) else cls()
