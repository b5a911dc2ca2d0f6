import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nvila.components.contracts.errors import ConfigError
from nvila.components.data.sampling import Sampling
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.describe import describe
from nvila.components.model.checkpoint.flat import open_checkpoint
from nvila.components.model.checkpoint.loading import load_flat
from nvila.components.model.checkpoint.native import image_processor, load_native, save_native
from nvila.components.model.checkpoint.quantized import load_quantized
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.fresh import init_model
from nvila.components.model.text.timetokens import add_time_tokens
from nvila.components.model.text.tokenizer import load_tokenizer, save_tokenizer, with_markers

ENCODERS = "llava.model.encoders."
HD_PICTURES = {
    "autogaze_model_id": "bfshi/AutoGaze",
    "gazing_ratio_tile": 0.75,
    "gazing_ratio_thumbnail": 0.75,
    "task_loss_requirement_tile": 0.7,
    "max_tiles_video": 8,
    "num_video_frames_thumbnail": 8,
    "mm_projector_shuffle_num": 9,
    "max_batch_size_autogaze": 32,
}
REFUSED = [
    ("ps3", True),
    ("ps3_dynamic_aspect_ratio", True),
    ("mm_low_res_token_num", 729),
    ("mm_vision_tower", "openai/clip-vit-large-patch14-336"),
    ("vision_tower", "OpenGVLab/InternViT-6B-448px-V1-2"),
    ("quantization_config", {"quant_method": "awq"}),
    ("model_type", "llava_topdown_llama"),
    ("architectures", ["LlavaTopDownLlamaModel"]),
    *HD_PICTURES.items(),
    ("AutoGaze", {"model": "bfshi/AutoGaze"}),
    ("mm_use_im_start_end", True),
    ("mm_vision_select_feature", "patch"),
    ("min_tiles", 2),
    ("video_max_tiles", 4),
    ("time_token_format", "[{t}]"),
    ("vision_resolution", 896),
    ("s2_max_split_size", 56),
    ("s2_resize_output_to_scale_idx", "last"),
    ("s2_scales", "28,50"),
    ("image_aspect_ratio", "resize"),
    ("image_aspect_ratio", "dynamic"),
    ("max_tiles", 0),
    ("max_tiles", "12"),
    ("num_video_frames", 0),
    ("num_video_frames", 2.5),
    ("mm_vision_select_layer", [-2]),
    ("fps", -1.0),
    ("fps", "2"),
    ("soft_ce_std", 0.0),
    ("num_time_tokens", -1),
    ("time_token_ids", 5),
    ("image_encoder", {"_target_": f"{ENCODERS}TSPVideoEncoder"}),
    ("image_encoder", {"_target_": "mine.encoders.BasicImageEncoder"}),
    ("image_encoder", {"start_tokens": "||"}),
    ("image_encoder", {"end_tokens": None}),
    ("image_encoder", {"_target_": f"{ENCODERS}BasicImageEncoder", "dropout": 0.5}),
    ("image_encoder", "not json"),
    ("video_encoder", {"_target_": f"{ENCODERS}BasicImageEncoder"}),
    ("video_encoder", {"_target_": "llava.remote.PerceiverVideoEncoder"}),
    ("video_encoder", {"_target_": f"{ENCODERS}BasicVideoEncoder", "pool_sizes": [[8, 1, 1]]}),
    ("video_encoder", {"_target_": f"{ENCODERS}TSPVideoEncoder", "pool_sizes": [[0, 1, 1]]}),
    ("video_encoder", {"_target_": f"{ENCODERS}TSPVideoEncoder", "pool_sizes": [8]}),
    ("video_encoder", {"sep_tokens": 7}),
    ("vision_tower_cfg", {"model_type": "intern_vit_6b"}),
    ("vision_tower_cfg", {"model_type": "clip_vision_model"}),
    ("vision_tower_cfg", {"model_type": "siglip2_vision_model"}),
    ("vision_tower_cfg", {"architectures": ["RADIOModel"]}),
    ("vision_tower_cfg", {"num_channels": 1}),
    ("vision_tower_cfg", {"model_type": "ps3_vision_model"}),
    ("llm_cfg", {"quantization_config": {"quant_method": "gptq"}}),
    ("mm_projector_cfg", {"mm_projector_type": None}),
    ("vision_tower_cfg", {"gazing_ratio": 0.5}),
    ("llm_cfg", {"model_type": "llama"}),
    ("llm_cfg", {"use_sliding_window": True}),
    ("llm_cfg", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("llm_cfg", {"tokenizer_model_max_length": "long"}),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_keys_of_the_configuration(configure: Any, key: str, value: Any) -> None:
    """Prevents a key that changes what the reference computes from being read over; the message names it."""
    content = configure().to_json()
    content[key] = content[key] | value if key.endswith("_cfg") else value
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(content)
    inner = next(iter(value)) if key.endswith("_cfg") else key
    assert inner in str(caught.value)
    if "gaz" in key or "ps3" in f"{key}{value}" or key in ("model_type", "architectures", *HD_PICTURES):
        assert "HD family" in str(caught.value)


def test_plain_s2_has_one_way_to_cut(configure: Any) -> None:
    """Prevents tiles of the largest scale, and padding, from being taken for the plain S2 that is computed."""
    content = configure(vision_mode="s2", s2_output_scale=0).to_json()
    assert ModelConfig.from_json(content | {"image_aspect_ratio": None}).vision_mode == "s2"
    for ratio in ("dynamic", "dynamic_s2", "pad"):
        with pytest.raises(ConfigError, match="image_aspect_ratio"):
            ModelConfig.from_json(content | {"image_aspect_ratio": ratio})


PUBLISHED = {
    "mm_use_im_patch_token": True,
    "chat_template": None,
    "drop_path_rate": 0.0,
    "fps": 0.0,
    "interpolate_mode": "linear",
    "mm_projector_lr": None,
    "vision_tower_lr": None,
    "num_time_tokens": 0,
    "time_token_format": "<t{t}>",
    "time_token_ids": [],
    "soft_ce_std": 1.0,
    "tune_language_model": True,
    "resume_path": "runs/train/qwen25-8B/model",
    "transformers_version": "4.46.0",
    "ps3": False,
    "look_close_mode": "after_image",
    "num_look_close": 1,
    "num_token_look_close": None,
    "top_down_prompt_head_type": "mlp",
    "high_res_pos_embed": False,
    "quantize_model": "false",
    "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
    "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
    "a_key_that_nobody_knows": [1, 2],
}
NULLABLE = [
    "fps",
    "s2_max_split_size",
    "vision_resolution",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "min_tiles",
    "max_tiles",
    "video_max_tiles",
    "num_video_frames",
    "image_encoder",
    "video_encoder",
    "soft_ce_std",
    "mm_use_im_start_end",
    "model_type",
]


@pytest.mark.parametrize("mode", ["resize", "dynamic", "dynamic_s2"])
def test_published_configurations_pass(configure: Any, mode: str) -> None:
    """Prevents keys of published configurations at their values, and null, from being refused."""
    config = configure(vision_mode=mode, video_pool_sizes=((1, 1, 1),), max_tiles=12, sampling=Sampling(8))
    content = config.to_json() | PUBLISHED
    if mode != "dynamic_s2":  # the reference's defaults, which nothing reads without S2
        content |= {"s2_scales": "336,672,1008", "s2_max_split_size": 336}
    assert ModelConfig.from_json(content) == config
    assert ModelConfig.from_json(content | dict.fromkeys(NULLABLE)) == config
    tower = {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"], "num_channels": 3}
    content["llm_cfg"] |= {"use_sliding_window": False, "sliding_window": 131072, "layer_types": ["full_attention"] * 2}
    content["vision_tower_cfg"] |= tower | {"num_image_tokens": 256, "projector_hidden_act": "gelu_fast"}
    assert ModelConfig.from_json(content | {"vision_resolution": 28}).vision_mode == mode


def test_the_output_scale_has_the_reference_s_default(configure: Any) -> None:
    """Prevents a configuration without the key from meaning the last scale, where the reference takes the first."""
    content = {key: v for key, v in configure().to_json().items() if key != "s2_resize_output_to_scale_idx"}
    assert ModelConfig.from_json(content).s2_output_scale == 0


@pytest.fixture
def saved(tokenizer: Any, configure: Any, tmp_path: Path) -> Path:
    save_native(init_model(configure(), tokenizer, 0), tokenizer, tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.48, 0.46, 0.41]),
        ("image_std", [0.5, 0.5, 0.4]),
        ("rescale_factor", 1 / 127.5),
        ("rescale_factor", 1),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_resize", False),
        ("do_center_crop", True),
        ("resample", 2),
        ("size", {"height": 384, "width": 384}),
        ("size", {"height": 28, "width": 56}),
        ("size", {"shortest_edge": 28}),
        ("size", 384),
        ("image_processor_type", "CLIPImageProcessor"),
        ("do_flip_channel_order", True),
        *HD_PICTURES.items(),
    ],
)
def test_another_preparation_of_pictures(saved: Path, key: str, value: Any) -> None:
    """Prevents a checkpoint whose pictures were prepared otherwise from being run on ours, in either layout."""
    path = saved / "vision_tower/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for read in (open_checkpoint, load_native):
        with pytest.raises(ConfigError, match=key):
            read(saved)


def test_the_flat_layout_is_checked_too(saved: Path, tmp_path: Path) -> None:
    """Prevents an HD model in the flat layout from being taken for NVILA-8B; published files and none at all pass."""
    convert(saved, tmp_path / "hf", "hf")
    path = tmp_path / "hf/preprocessor_config.json"
    assert open_checkpoint(tmp_path / "hf").config.s2_output_scale == -1
    own = json.loads(path.read_text())
    for passes in ({"size": 28}, {"size": None, "resample": None}, {"size": {"height": 56, "width": 56}}):
        path.write_text(json.dumps(own | passes))
        open_checkpoint(tmp_path / "hf")
    path.write_text(json.dumps(image_processor(392) | HD_PICTURES))
    with pytest.raises(ConfigError, match="HD family"):
        open_checkpoint(tmp_path / "hf")
    path.unlink()
    open_checkpoint(tmp_path / "hf")


def test_time_tokens_are_counted(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents answers in time tokens that the vocabulary does not have, or has more of than the model was taught."""
    save_tokenizer(tokenizer, tmp_path / "plain", 256)
    timed = AutoTokenizer.from_pretrained(tmp_path / "plain")
    add_time_tokens(timed, 5)
    save_tokenizer(with_markers(timed), tmp_path / "timed", 256)
    timed = load_tokenizer(tmp_path / "timed")
    save_native(init_model(configure(), timed, 0), timed, tmp_path / "native")
    assert load_native(tmp_path / "native")[0].config.time_tokens == 5
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    assert load_flat(tmp_path / "hf")[0].config.time_tokens == 5
    convert(tmp_path / "native", tmp_path / "serving", "serving")
    assert load_quantized(tmp_path / "serving")[0].config.time_tokens == 5
    path = tmp_path / "native/config.json"
    for number in (3, 100):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_time_tokens": number}))
        for read in (load_native, describe, lambda folder: convert(folder, tmp_path / "vila", "vila")):
            with pytest.raises(ConfigError, match=f"num_time_tokens.*{number}"):
                read(tmp_path / "native")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_time_tokens": None, "time_token_ids": [7, 8]}))
    with pytest.raises(ConfigError, match=r"time_token_ids.*got 2"):
        load_native(tmp_path / "native")


@pytest.mark.parametrize("key", ["max_position_embeddings", "rms_norm_eps", "hidden_act"])
def test_what_transformers_refuses(saved: Path, tmp_path: Path, key: str) -> None:
    """Prevents a raw error of a library, which names no file, for a key that its configurations do not take."""
    path = saved / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "soft" if key == "hidden_act" else None}))
    for read in (load_native, lambda folder: convert(folder, tmp_path / "hf", "hf")):
        with pytest.raises(ConfigError, match="cannot be built"):
            read(saved)


def test_a_decoder_of_fewer_tokens_than_the_tokenizer(saved: Path, tmp_path: Path) -> None:
    """Prevents a conversion from mending in silence what loading refuses."""
    path = saved / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 10}))
    for read in (load_native, lambda folder: convert(folder, tmp_path / "hf", "hf")):
        with pytest.raises(ConfigError, match="10 tokens, the tokenizer 300"):
            read(saved)
