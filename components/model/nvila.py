"""The model: SigLIP tower, projector and Qwen2 decoder around the spliced sequence (`llava/model/llava_arch.py`).

The mathematics lies in `visual`, `splice` and their neighbours; this file joins them to transformers' sub-models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.model.config.config import ModelConfig, with_vocabulary
from nvila.components.model.config.rope import with_rope
from nvila.components.model.device import kernel_arguments, plain_attention
from nvila.components.model.splice import Spliced, splice
from nvila.components.model.text.conversation import IGNORED
from nvila.components.model.text.timetokens import soft_cross_entropy
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.preprocess import Visual
from nvila.components.model.vision.projector import Projector, build_projector
from nvila.components.model.vision.tower import tower_features
from nvila.components.model.vision.visual import VideoMarks, encode_visuals


@dataclass(frozen=True)
class Output:
    """Result of a forward. B rows, T positions after splicing, V tokens."""

    loss: torch.Tensor | None
    """Cross-entropy of the supervised tokens, their mean or their sum, float32; None without labels."""
    logits: torch.Tensor | None
    """(B, T, V); None where only the loss was asked for."""
    labels: torch.Tensor | None
    """(B, T) after splicing, not shifted: the prediction of position t stands at t - 1."""
    supervised: int = 0
    """Tokens that the loss is of."""


class NVILA(nn.Module):
    """Vision tower -> projector -> decoder.

    The decoder keeps exactly the saved vocabulary: media tokens have ids behind it, are always replaced by visual
    embeddings, and can never be generated.
    """

    llm: Any
    """transformers' `Qwen2ForCausalLM`."""
    vision_tower: Any
    """transformers' `SiglipVisionModel`."""

    def __init__(
        self, config: ModelConfig, tokens: TokenIds, llm: nn.Module, vision_tower: nn.Module, mm_projector: Projector
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.llm = llm
        self.vision_tower = vision_tower
        self.mm_projector = mm_projector

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.llm.get_input_embeddings().weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        visuals: Sequence[Visual],
        labels: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        *,
        multiple: int = 1,
        full_logits: bool | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Output:
        """Loss and logits of a padded batch (either side).

        Args:
            input_ids: (B, L) with one media token per visual.
            attention_mask: (B, L), zero on padding.
            visuals: in order of appearance across the batch.
            labels: (B, L), -100 where unsupervised; with labels samples are cut to `max_length_tokens`.
            rows: (B,) ascending, the decoder's row that each sample lies in; they do not see each other. None is a row
                of its own.
            multiple: of what the decoder's positions are one; what they lack is padding.
            full_logits: compute logits at every position. By default only where there are no labels: training needs
                them at supervised positions alone.
            reduction: of the loss. A sum may be of nothing: it is 0, and its gradients are.

        Raises:
            DataError: media and markers do not match, or the mean is to be taken and nothing is supervised.
        """
        spliced = self.prepare(input_ids, attention_mask, visuals, labels, rows=rows, multiple=multiple)
        hidden = self.hidden_states(spliced)
        wanted = labels is None if full_logits is None else full_logits
        logits = self.llm.lm_head(hidden) if wanted else None
        if spliced.labels_BT is None:
            return Output(None, logits, None)
        losses, _ = self.token_losses(hidden, spliced.labels_BT, soft=True)
        if reduction == "sum":
            return Output(losses.sum(), logits, spliced.labels_BT, len(losses))
        if not len(losses):
            raise DataError("no supervised token in the batch", do="Raise model.max_length_tokens or check the answers")
        return Output(losses.mean(), logits, spliced.labels_BT, len(losses))

    def prepare(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        visuals: Sequence[Visual],
        labels: torch.Tensor | None = None,
        side: str = "right",
        rows: torch.Tensor | None = None,
        multiple: int = 1,
    ) -> Spliced:
        """Encode the visuals and splice them into the token embeddings, padded on `side`."""
        embed = self.llm.get_input_embeddings()
        newline = embed(torch.tensor([self.tokens.newline], device=self.device))[0]
        marks = None
        if self.tokens.video_marks is not None:
            marks = VideoMarks(
                *(embed(torch.tensor(m, dtype=torch.long, device=self.device)) for m in self.tokens.video_marks)
            )
        touch = None
        if self.training and not visuals:
            # Each rank must run the tower and projector, or ZeRO-3's collectives would wait for ever.
            blank = torch.zeros(1, 3, self.config.tile_pixels, self.config.tile_pixels)
            touch = self.encode([Visual("image", blank, None)], newline)[0].sum() * 0
        encoded = self.encode(visuals, newline, marks)
        media: dict[int, list[torch.Tensor]] = {self.tokens.image: [], self.tokens.video: []}
        for visual, sequence in zip(visuals, encoded, strict=True):
            media[self.tokens.image if visual.kind == "image" else self.tokens.video].append(sequence)
        spliced = splice(
            embed,
            input_ids,
            attention_mask,
            labels,
            media,
            max_length=self.config.max_length_tokens if labels is not None else None,
            side="left" if side == "left" else "right",
            rows=rows,
            multiple=multiple,
        )
        return spliced if touch is None else replace(spliced, embeds_BTH=spliced.embeds_BTH + touch)

    def encode(
        self, visuals: Sequence[Visual], newline: torch.Tensor, marks: VideoMarks | None = None
    ) -> list[torch.Tensor]:
        """Embedding sequence (n_i, H) of each visual."""
        return encode_visuals(self.features, self.mm_projector, newline, visuals, self.config, marks)

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """(T, 3, S, S) normalised tiles to the tower's (T, N, C) features."""
        return tower_features(self.vision_tower, tiles, self.config.select_layer)

    def hidden_states(self, spliced: Spliced) -> torch.Tensor:
        """(B, T, H) last hidden states of the decoder.

        Where rows hold several samples no mask is given: transformers makes one of positions that begin anew.
        """
        packed = spliced.lengths_S is not None
        return self.llm.model(
            inputs_embeds=spliced.embeds_BTH,
            attention_mask=None if packed else spliced.attention_mask_BT,
            position_ids=spliced.position_ids_BT,
            use_cache=False,
            **kernel_arguments(self.llm.config._attn_implementation, spliced.lengths_S),
        ).last_hidden_state

    def token_losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, *, soft: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy (n,) float32 of each supervised token and its row (n,); `soft` blurs targets in time."""
        logits, targets, rows = self.predictions(hidden, labels)
        if soft and self.tokens.time:
            losses = soft_cross_entropy(logits, targets, self.tokens.time, self.config.soft_ce_std)
        else:
            losses = F.cross_entropy(logits, targets, reduction="none")
        return losses, rows

    def predictions(
        self, hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (n, V) float32 where a supervised token is to be predicted, that token (n,), and its row (n,).

        Args:
            hidden: (B, T, H) last hidden states.
            labels: (B, T) after splicing, not shifted.
        """
        supervised = labels[:, 1:] != IGNORED
        logits = self.llm.lm_head(hidden[:, :-1][supervised]).float()
        return logits, labels[:, 1:][supervised], supervised.nonzero()[:, 0]

    def prepare_for_training(self) -> None:
        """Training mode; on a CPU with attention in plain matrix products.

        The backward pass of torch's fused attention on CPU takes longer in bfloat16 than all matrix products of a
        small model together: 0.20 s against 0.11 s a step of the tiny recipe (one thread).
        """
        self.train()
        if self.device.type == "cpu":
            for part in (self.vision_tower, self.llm):
                part.set_attn_implementation(plain_attention())

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations of tower and decoder blocks in the backward pass."""
        for part in (self.vision_tower, self.llm):
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NVILA:
        """Casts of the whole model leave the rotary frequencies in float32: in bfloat16 long positions would blur."""
        rotary = self.llm.model.rotary_emb
        exact = {name: buffer for name, buffer in rotary.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(rotary, name, buffer.to(getattr(rotary, name).device))
        return self


def build_model(config: ModelConfig, tokens: TokenIds, dtype: torch.dtype = torch.float32) -> NVILA:
    """The modules with the random weights of torch's current generator.

    Raises:
        ConfigError: the sub-models are not SigLIP and Qwen2, or their configurations do not fit.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    if config.llm.get("model_type", "qwen2") != "qwen2":
        raise ConfigError("the decoder is not Qwen2", where="llm_cfg: model_type", value=config.llm["model_type"])
    if config.llm["vocab_size"] != tokens.vocabulary:
        raise ConfigError(
            f"the decoder has {config.llm['vocab_size']} tokens, the tokenizer {tokens.vocabulary}",
            where="llm_cfg: vocab_size",
        )
    try:
        llm_config = Qwen2Config.from_dict(_computed(with_rope(config.llm, config.max_length_tokens), DECODER_KEYS))
        vision_config = SiglipVisionConfig.from_dict(
            _computed(config.vision, TOWER_KEYS) | {"vision_use_head": False}  # never computed
        )
        llm = Qwen2ForCausalLM._from_config(llm_config, dtype=dtype, attn_implementation="sdpa")
        tower = SiglipVisionModel._from_config(vision_config, dtype=dtype, attn_implementation="sdpa")
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
        StrictDataclassError,
    ) as error:
        raise ConfigError(
            "the sub-models cannot be built", where="llm_cfg, vision_tower_cfg", value=str(error)
        ) from None
    projector = build_projector(config.projector, config.mm_hidden_size, config.llm_hidden_size).to(dtype)
    return NVILA(config, tokens, llm, tower, projector)


_BOTH = (
    "architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
    "attention_dropout initializer_range"
)
TOWER_KEYS = frozenset(f"{_BOTH} num_channels image_size patch_size layer_norm_eps".split())
DECODER_KEYS = frozenset(
    f"{_BOTH} vocab_size num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling "
    "rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id".split()
)
"""Keys that say what a part computes. Of others, transformers would make labels without number, or other outputs."""


def _computed(part: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key in keys}


def empty_model(config: ModelConfig, tokens: TokenIds | None = None) -> NVILA:
    """The modules on the meta device: names, shapes and configurations without a byte of weights.

    Args:
        config: the architecture.
        tokens: a tokenizer's ids; without them those of Qwen2 behind the configuration's own vocabulary.
    """
    if tokens is None:
        size = int(config.llm["vocab_size"])
        tokens = TokenIds(size, size + 1, size + 2, newline=198, end=size - 3, pad=size - 1)
    with torch.device("meta"):
        return build_model(with_vocabulary(config, tokens.vocabulary), tokens)
