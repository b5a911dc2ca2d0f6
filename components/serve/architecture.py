"""NVILA for vLLM: vLLM's SigLIP and Qwen2 with our own visual path between them.

Tiling, S2 merging, pooling and the projector are the plain torch functions of `components/model`, shared with training;
only the two big stacks are vLLM's, so that its attention, its parallel layers and its quantization kernels are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from nvila.components.contracts.errors import DataError
from nvila.components.model.checkpoint.weights import require_finite
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.text.controls import IMAGE_TOKEN, VIDEO_TOKEN
from nvila.components.model.vision.preprocess import Kind, Visual
from nvila.components.model.vision.projector import build_projector
from nvila.components.model.vision.visual import encode_visuals
from nvila.components.serve.config import NVILAServingConfig
from nvila.components.serve.processing import MODALITIES, NVILADummyInputs, NVILAProcessingInfo, NVILAProcessor
from nvila.components.serve.tower import build_tower
from nvila.components.serve.unpacked import register_unpacked

register_unpacked()


@MULTIMODAL_REGISTRY.register_processor(NVILAProcessor, info=NVILAProcessingInfo, dummy_inputs=NVILADummyInputs)
class NVILAForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP, SupportsQuant):
    """Module names equal the names of the serving folder: `llm.`, `vision_tower.vision_model.`, `mm_projector.`."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.": "llm.model."})
    """An adapter's names are those of the decoder alone."""

    def get_mm_mapping(self) -> MultiModelKeys:
        """Prefixes of the parts: adapters are of the decoder."""
        return MultiModelKeys.from_string_field(
            language_model="llm", connector="mm_projector", tower_model="vision_tower"
        )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The marker of the HTTP API; where it stands says the chat template."""
        return {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config: NVILAServingConfig = vllm_config.model_config.hf_config
        config = ModelConfig.from_json(hf_config.nvila)
        self.config, self.nvila = hf_config, config
        self.configure_mm_token_handling(  # type: ignore[operator]
            vocab_size=hf_config.text_config.vocab_size,
            mm_token_ids=[hf_config.image_token_id, hf_config.video_token_id],
        )
        with self._mark_tower_model(vllm_config, {"image", "video"}):  # type: ignore[operator]
            self.vision_tower = build_tower(
                hf_config.vision_config,
                config.select_layer,
                vllm_config.quant_config,
                maybe_prefix(prefix, "vision_tower"),
            )
            self.mm_projector = build_projector(
                config.projector, config.mm_hidden_size, hf_config.text_config.hidden_size
            ).to(vllm_config.model_config.dtype)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.llm = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=hf_config.text_config,
                prefix=maybe_prefix(prefix, "llm"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.llm.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Embeddings (n, H) of each item, in the order of the items; n as counted by the processor.

        vLLM calls this once per modality, with the items of many requests.
        """
        items: list[list[Visual]] = []
        for kind in MODALITIES:
            if (tiles := kwargs.get(f"{kind}_tiles")) is not None:
                blocks = kwargs[f"{kind}_block"]
                items += [_visuals(kind, each, block) for each, block in zip(tiles, blocks, strict=True)]
        flat = [visual for visuals in items for visual in visuals]
        device = next(self.mm_projector.parameters()).device
        newline = self.llm.embed_input_ids(torch.tensor([self.config.newline_token_id], device=device))[0]
        encoded = iter(encode_visuals(self.vision_tower, self.mm_projector, newline, flat, self.nvila))
        return [torch.cat([next(encoded) for _ in visuals]) for visuals in items]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of the decoder; vLLM has put the visual embeddings into `inputs_embeds` already."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.llm.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits over the vocabulary."""
        return self.llm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Read the safetensors of the serving folder; names need no mapping.

        vLLM itself looks for missing weights in plain checkpoints only, and at no value.

        Raises:
            DataError: a weight is missing or not finite.
        """
        loaded = AutoWeightsLoader(self).load_weights(_finite(weights))
        needed = {name for name, _ in self.named_parameters() if name.endswith(_STORED)}
        if missing := sorted(needed - loaded):
            raise DataError("tensors do not match the model", where="the serving folder", value=missing[:5])
        return loaded


_STORED = (".weight", ".bias", ".weight_scale", ".weight_packed")
"""Ends of the parameters that a serving folder has to fill; others are made by vLLM's kernels."""


def _finite(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        require_finite(tensor, name, "the serving folder")
        yield name, tensor


def _visuals(kind: Kind, tiles: torch.Tensor, block: torch.Tensor) -> list[Visual]:
    """One visual for a clip or an S2 picture, whose tiles belong together, else one per tile."""
    rows, columns = block.tolist()
    if rows:
        return [Visual(kind, tiles, (rows, columns))]
    return [Visual(kind, tiles, None)] if kind == "video" else [Visual(kind, tile[None], None) for tile in tiles]
