"""Recipe section `rollout.endpoint`: what the endpoint lets people do, the same on this machine and in pods."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from nvila.components.contracts.recipe.section import MOST_CHARACTERS, MOST_ENTRIES, Disagreement, Folder, Section


def host_name(text: str) -> str:
    """The text, where it is an address without brackets or the name of a machine.

    Raises:
        ValueError: it is neither.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*", text):
            raise ValueError("neither an address nor the name of a machine") from None
    return text


def _domain(text: str) -> str:
    host_name(text)
    if re.fullmatch(r"[0-9.]+|.*:.*", text):
        raise ValueError("an address; media come from domains")
    return text.lower()


Domain = Annotated[str, Field(min_length=1, max_length=253), AfterValidator(_domain)]
Origin = Annotated[str, Field(max_length=300, pattern=r"^(\*|https?://[^\s/]+)$")]
Adapter = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MOST_CHARACTERS)]
MOST_ADAPTERS = 64
"""Each takes memory beside the model, whether it is asked or not."""


class EndpointSettings(Section):
    """Limits and permissions of the endpoint. A request beyond one is refused with a reason, and harms nobody else."""

    max_body_mib: int = Field(default=96, ge=1, le=1024)
    """Largest body of a request; media in it are a third larger than their files."""
    max_media: int = Field(default=256, ge=0, le=1024)
    """Most pictures and clips of a request; the frames of a clip that comes as frames count one by one."""
    max_answers: int = Field(default=16, ge=1, le=1024)
    """Most answers of a request: `n`, times its prompts."""
    max_tokens: int = Field(default=16_384, ge=1, le=2**20)
    """Most tokens that a request may ask for: `max_tokens` times its answers."""
    max_media_seconds: float = Field(default=30.0, ge=0.1, le=3600)
    """Longest time that the decoding of a request's media may take."""
    max_requests: int = Field(default=256, ge=1, le=65_536)
    """Most requests at a time; the next one is told to come again (429)."""
    max_connections: int = Field(default=1024, ge=1, le=65_536)
    """Most connections at a time."""
    request_seconds: float = Field(default=600.0, ge=1, le=86_400)
    """Longest time from the first byte of a request to the last of its answer."""
    media_domains: list[Domain] = Field(default=[], max_length=MOST_ENTRIES)
    """Hosts that pictures and clips may be fetched from, each as it stands; nothing is fetched without."""
    media_folders: list[Folder] = Field(default=[], max_length=MOST_ENTRIES)
    """Folders whose files `file://` addresses may name; none may without."""
    media_cache_mib: int = Field(default=256, ge=0, le=2**20)
    """Memory for pictures and clips that were decoded, so that the same one is not decoded again, and as much once more
    for what was made of them for the model."""
    adapters: dict[Adapter, Folder] = Field(default={}, max_length=MOST_ADAPTERS)
    """LoRA adapters of the language model by the name that requests call each, in peft's format: they are served
    beside the model, from its weights. They are of this very model: one that was trained with a projector or a tower
    of its own gives other answers here than the model that it was merged into."""
    origins: list[Origin] = Field(default=[], max_length=MOST_ENTRIES)
    """Web sites whose pages may ask the endpoint (CORS), as browsers name them; `*` for any."""
    certificate: Folder | None = None
    """PEM file of the server's certificate chain; the endpoint then speaks TLS."""
    certificate_key: Folder | None = None
    """PEM file of its private key."""

    def disagreements(self) -> Iterator[Disagreement]:
        """A certificate and its key come together."""
        if (self.certificate is None) != (self.certificate_key is None):
            yield Disagreement("certificate_key", "a certificate and its key come together", self.certificate_key)
