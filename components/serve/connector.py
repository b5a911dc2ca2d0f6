"""vLLM's way to media: every URL of the HTTP API goes through `media`, with our own bounded decoders.

vLLM's stock connector fetches any http(s) URL and decodes video with OpenCV. This one reads what the operator allows,
and samples frames exactly as training did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import numpy as np
from PIL import Image
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaWithBytes

from nvila.components.data.sampling import Sampling
from nvila.components.serve.media import BusyError, Media, Medium, begun

T = TypeVar("T")


@cache
def _media() -> Media:
    return Media.of_process()


class BoundedConnector(MediaConnector):
    """Pictures and clips as `media` reads them. vLLM's caches know each by the digest of its content."""

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        """RGB picture, turned upright, within the limits."""
        found = await _answered(_media().picture(image_url, begun() or _media().allowance()))
        picture = await asyncio.to_thread(Image.fromarray, found.pixels)
        return MediaWithBytes(picture, found.key)

    async def fetch_video_async(self, video_url: str, **_: Any) -> MediaWithBytes[tuple[np.ndarray, dict[str, Any]]]:
        """Frames (F, H, W, 3) uint8, sampled as `--media-io-kwargs` says, or as the request asks within its limits."""
        sampling = Sampling.from_options(self.media_io_kwargs["video"])
        found = await _answered(_media().clip(video_url, sampling, begun() or _media().allowance()))
        count = len(found.pixels)
        metadata = {"total_num_frames": count, "frames_indices": [*range(count)], "do_sample_frames": False}
        return MediaWithBytes((found.pixels, metadata), found.key)

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        """`fetch_image_async` for who has no event loop."""
        return _run(self.fetch_image_async(image_url))

    def fetch_video(self, video_url: str, **_: Any) -> MediaWithBytes[tuple[np.ndarray, dict[str, Any]]]:
        """`fetch_video_async` for who has no event loop."""
        return _run(self.fetch_video_async(video_url))

    def load_from_url(self, *_: Any, **__: Any) -> NoReturn:
        """What vLLM's own readers of other kinds of media would fetch."""
        raise ValueError("this server takes pictures and clips, no other media")

    async def load_from_url_async(self, *_: Any, **__: Any) -> NoReturn:
        """The same."""
        self.load_from_url()


async def _answered(reading: Coroutine[Any, Any, Medium]) -> Medium:
    """vLLM answers a ValueError with 400."""
    try:
        return await reading
    except BusyError as error:
        raise GracefulHTTPError(error.what, HTTPStatus.SERVICE_UNAVAILABLE) from error


def _run(reading: Coroutine[Any, Any, T]) -> T:
    """In a thread, as this one may have a loop that runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, reading).result()


def register_connector(name: str) -> None:
    """Make the connector selectable as `VLLM_MEDIA_CONNECTOR=<name>`."""
    MEDIA_CONNECTOR_REGISTRY.register(name)(BoundedConnector)
