"""How media of an HTTP request become pictures and frames: data URLs only, through our own bounded decoders.

vLLM's stock connector fetches any http(s) URL and decodes video with OpenCV. Ours refuses remote addresses unless the
operator lists domains, never follows one to a private address, and samples frames exactly as training did.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaWithBytes

from nvila.components.contracts.errors import DataError
from nvila.components.data.media import Limits, load_image, load_video_frames
from nvila.components.data.sampling import Sampling

LIMITS = Limits(max_bytes=64 * 2**20, max_seconds=600.0, max_frames=36_000)
"""Tighter than for files of one's own: whoever may ask a question may send anything. They are those of the endpoint
whatever the model's recipe allows of its data: the rollout counts a pinned prompt beyond them as an error."""


class BoundedConnector(MediaConnector):
    """Pictures and clips from `data:` URLs; from http(s) only for the domains of `--allowed-media-domains`."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        """RGB picture, turned upright, within `Limits`."""
        data = self._bytes(image_url)
        return MediaWithBytes(_decode(data, ".img", partial(load_image, limits=LIMITS)), data)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        """`fetch_image` off the event loop."""
        return await asyncio.to_thread(self.fetch_image, image_url)

    def fetch_video(self, video_url: str, **_: Any) -> MediaWithBytes[tuple[np.ndarray, dict[str, Any]]]:
        """Frames (F, H, W, 3) uint8, spread as `load_video_frames` does; sampled as `--media-io-kwargs` says.

        vLLM refuses requests that bring their own `media_io_kwargs`, and the processor any other F than the model's.
        """
        sampling = Sampling.from_options(self.media_io_kwargs["video"])
        data = self._bytes(video_url)
        pictures = _decode(data, ".mp4", partial(load_video_frames, sampling=sampling, limits=LIMITS))
        stacked = np.stack([np.asarray(picture) for picture in pictures])
        metadata = {"total_num_frames": len(stacked), "frames_indices": list(range(len(stacked)))}
        metadata["do_sample_frames"] = False
        return MediaWithBytes((stacked, metadata), data)

    async def fetch_video_async(self, video_url: str, **_: Any) -> MediaWithBytes[tuple[np.ndarray, dict[str, Any]]]:
        """`fetch_video` off the event loop."""
        return await asyncio.to_thread(self.fetch_video, video_url)

    def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return _data_url(url)
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError("a media URL must be a data: URL")
        if not self.allowed_media_domains:
            raise ValueError("remote media URLs are switched off on this server; send the bytes as a data: URL")
        self._assert_url_in_allowed_media_domains(_Spec(urlsplit(url).hostname))  # type: ignore[arg-type]
        _refuse_private(url)
        data = self.connection.get_bytes(url, timeout=20, allow_redirects=False, max_bytes=LIMITS.max_bytes)
        return bytes(data)


class _Spec:
    """The one attribute of a parsed URL that vLLM's domain check reads."""

    def __init__(self, hostname: str | None) -> None:
        self.hostname = hostname


def register_connector(name: str) -> None:
    """Make the connector selectable as `VLLM_MEDIA_CONNECTOR=<name>`."""
    MEDIA_CONNECTOR_REGISTRY.register(name)(BoundedConnector)


def _data_url(url: str) -> bytes:
    header, comma, body = url[5:].partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("a data: URL must read data:<type>;base64,<bytes>")
    if len(body) > LIMITS.max_bytes * 4 // 3 + 4:
        raise ValueError(f"the media of a data: URL may have at most {LIMITS.max_bytes} bytes")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError("the bytes of a data: URL are not base64") from error


def _refuse_private(url: str) -> None:
    """An allowed name may still resolve to an inner address; every address it has must be public."""
    parts = urlsplit(url)
    for info in socket.getaddrinfo(parts.hostname, parts.port or 443, proto=socket.IPPROTO_TCP):
        address = ipaddress.ip_address(info[4][0])
        if not address.is_global:
            raise ValueError(f"{parts.hostname} resolves to {address}, which is not a public address")


def _decode(data: bytes, suffix: str, decode: Any) -> Any:
    """Run one of our path-based decoders on bytes; its DataError becomes the ValueError that vLLM answers with 400."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        try:
            return decode(Path(file.name))
        except DataError as error:
            raise ValueError(error.what) from error
