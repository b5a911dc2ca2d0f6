"""From a prompt with media to token placeholders and tensors: the part of the plugin that runs in the front end.

It wraps `model.vision.preprocess`, the same code that made the training batches; no image processor of another library
is involved. The media markers of the prompt become as many placeholder tokens as the model will put embeddings there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.cache.base import MultiModalCache, MultiModalProcessorCacheItem, MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.text.controls import IMAGE_TOKEN, VIDEO_TOKEN
from nvila.components.model.vision.preprocess import Kind, Visual, blank, preprocess_image, preprocess_video
from nvila.components.model.vision.visual import token_count
from nvila.components.serve.config import NVILAServingConfig
from nvila.components.serve.told import Told

MODALITIES: tuple[Kind, ...] = ("image", "video")


class NVILAProcessingInfo(BaseProcessingInfo):
    """Facts about the model that vLLM asks for before there is a model."""

    def get_hf_config(self) -> NVILAServingConfig:
        """The config of the serving folder."""
        return self.ctx.get_hf_config(NVILAServingConfig)

    @cached_property
    def nvila(self) -> ModelConfig:
        """The architecture."""
        return ModelConfig.from_json(self.get_hf_config().nvila)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of either."""
        return {"image": None, "video": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """No processor of transformers is involved."""
        return {}


class NVILADummyInputs(BaseDummyInputsBuilder[NVILAProcessingInfo]):
    """The largest input, from which vLLM sizes its encoder cache."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One marker per item."""
        return IMAGE_TOKEN * mm_counts.get("image", 0) + VIDEO_TOKEN * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        """A picture whose aspect ratio calls for the most tiles, and a clip of the configured length."""
        config = self.info.nvila
        side = config.s2_scales[-1]
        wide = Image.new("RGB", (side * config.max_tiles, side))
        clip = np.zeros((config.sampling.frames, side, side, 3), dtype=np.uint8)
        return {"image": [wide] * mm_counts.get("image", 0), "video": [clip] * mm_counts.get("video", 0)}


class Kept(MultiModalProcessorOnlyCache):
    """Tiles by digest, in this process alone.

    vLLM's own cache does not send what it believes the engine to have. A request that overtakes the one that brings a
    picture, or comes behind one that was given up in between, then fails with 500.
    """

    def __init__(self, size_bytes: int) -> None:
        self._cache = MultiModalCache.get_lru_cache(size_bytes / 2**30, MultiModalProcessorCacheItem)
        self._found: dict[str, MultiModalProcessorCacheItem] = {}

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether it is there, and stays so until `release`: a large one of the same prompt may push it out."""
        if (item := self._cache.get(mm_hash)) is not None:
            self._found[mm_hash] = item
        return item is not None

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        """The tiles, and what they are in a prompt; `mm_item` is None where they were found."""
        if (found := self._found.get(mm_hash)) is not None:
            return found.item, found.prompt_updates
        return super().get_and_update_item(mm_item, mm_hash)

    def release(self) -> None:
        """Let go of what was found for a prompt."""
        self._found.clear()


class NVILAProcessor(BaseMultiModalProcessor[NVILAProcessingInfo]):
    """Cuts pictures and frames into tiles and expands the markers."""

    @cached_property
    def _kept(self) -> Kept:
        return Kept(Told.read().settings.media_cache_mib * 2**20)

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """A picture is tiled only when it is the prompt's only one, or where the request says `tile_all`, as training
        does; with `blank` grey is shown in place of all media.

        The rule looks at the whole prompt while vLLM processes and caches item by item, so it travels with the item's
        options, which are part of the cache's key.
        """
        asked = inputs.hf_processor_mm_kwargs
        alone = bool(asked.get("tile_all")) or inputs.mm_data_items.get_all_counts().get("image", 0) == 1
        options = {**asked, "images_kwargs": {"alone": alone}}
        cache = self._kept if inputs.cache is None else inputs.cache
        try:
            return super().apply(replace(inputs, hf_processor_mm_kwargs=options, cache=cache), timing_ctx)
        finally:
            self._kept.release()

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        config = self.info.nvila
        alone = _alone(hf_kwargs)
        cut: dict[str, list[list[Visual]]] = {
            "image": [preprocess_image(one, config, alone=alone, pixels=True) for one in hf_data.get("images") or ()],
            "video": [
                [preprocess_video(_frames(one, config), config, pixels=True)] for one in hf_data.get("videos") or ()
            ],
        }
        output: dict[str, Any] = {}
        for modality, items in cut.items():
            shown = [[blank(each) for each in item] for item in items] if hf_kwargs.get("blank") else items
            output |= _fields(modality, shown, config) if shown else {}
        return BatchFeature(output)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        # Block sizes and counts steer Python code, so they stay in host memory.
        return {
            f"{modality}_{field}": MultiModalFieldConfig.batched(modality, keep_on_cpu=field != "tiles")
            for modality in MODALITIES
            for field in ("tiles", "block", "tokens")
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        hf_config = self.info.get_hf_config()
        alone = _alone(hf_processor_mm_kwargs)
        # The markers' ids lie behind the vocabulary. In their place stands a token of it that no text has: where
        # prompt_logprobs or penalties look up the prompt's tokens, an id without a logit would end the engine.
        placeholder = self.info.get_tokenizer().pad_token_id

        def replacement(modality: str, token: int) -> Any:
            def expand(index: int) -> PromptUpdateDetails:
                item = out_mm_kwargs[modality][index]
                counts = item[f"{modality}_tokens"].data.flatten().tolist()
                ids = [placeholder] * counts[0]
                if self.info.nvila.vision_mode == "dynamic" and alone and modality == "image":
                    # Each tile of dynamic tiling stands on a line of its own (`prompt.picture_marker`). The break
                    # behind the last one is the prompt's, which may end there.
                    ids = [i for count in counts for i in (*[placeholder] * count, hf_config.newline_token_id)][:-1]
                return PromptUpdateDetails.select_token_id(ids, placeholder)

            return PromptReplacement(modality=modality, target=[token], replacement=expand)

        return [replacement("image", hf_config.image_token_id), replacement("video", hf_config.video_token_id)]


def _fields(modality: str, items: Sequence[Sequence[Visual]], config: ModelConfig) -> dict[str, list[torch.Tensor]]:
    """What the model needs of each item: uint8 tiles (T, 3, S, S), block size or (0, 0), tokens of each visual."""
    counts = [[token_count(v.kind, v.block_size, len(v.tiles), config) for v in visuals] for visuals in items]
    return {
        f"{modality}_tiles": [torch.cat([visual.tiles for visual in visuals]) for visuals in items],
        f"{modality}_block": [torch.tensor(visuals[0].block_size or (0, 0)) for visuals in items],
        f"{modality}_tokens": [torch.tensor(each) for each in counts],
    }


def _alone(options: Mapping[str, Any]) -> bool:
    return bool(options["images_kwargs"]["alone"])


def _frames(video: Any, config: ModelConfig) -> list[Image.Image]:
    """(F, H, W, 3) uint8, or a list of pictures -> pictures.

    Raises:
        ValueError: a number of frames that the model does not take; found later it would end the whole server.
    """
    if not config.sampling.allows(len(video)):
        raise ValueError(f"this model takes {config.sampling.frames} frames of a clip, not {len(video)}")
    return [frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame)) for frame in video]
