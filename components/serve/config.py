"""The Hugging Face config class of a serving folder (`model_type` nvila); vLLM finds it through `plugin.register`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig


class NVILAServingConfig(PreTrainedConfig):
    """Decoder, tower and, under `nvila`, the keys of `ModelConfig` that neither of the two knows."""

    model_type = "nvila"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | Qwen2Config | None = None,
        vision_config: dict[str, Any] | SiglipVisionConfig | None = None,
        nvila: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        newline_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = (
            Qwen2Config(**(text_config or {})) if not isinstance(text_config, Qwen2Config) else text_config
        )
        self.vision_config = (
            vision_config
            if isinstance(vision_config, SiglipVisionConfig)
            else SiglipVisionConfig(**(vision_config or {}))
        )
        self.nvila = nvila or {}
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.newline_token_id = newline_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)
