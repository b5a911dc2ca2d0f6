"""Keys of published configurations that ask for something that this model does not compute: one table each file.

A key that is absent, null or at the value that we compute passes. Keys that change nothing in the reference
(training settings, paths, `interpolate_mode`, `drop_path_rate` of another tower, `mm_use_im_patch_token`, which
published configurations set and nothing reads) have no row, and neither have keys that nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvila.components.contracts.errors import ConfigError

HALF = [0.5, 0.5, 0.5]
BICUBIC = 3
"""Pillow's number."""
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Rule:
    """What a key may say."""

    keys: str
    """Pattern of the key's whole name."""
    computed: Check
    """Whether a value that is not null is what we compute."""
    what: str
    do: str


def _off(value: Any) -> bool:
    return not value


def _is(*values: Any) -> Check:
    return lambda value: any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _free_of(*words: str) -> Check:
    return lambda value: not any(word in str(value).lower() for word in words)


_HD = (
    "this is a model of the HD family (PS3, AutoGaze), which chooses patches before the tower; it is not computed here"
)
_OTHER = "Use a checkpoint of NVILA, NVILA-Lite or NVILA-Video"
_AUTOGAZE = Rule(
    r".*gaz(e|ing).*|task_loss_requirement.*|max_tiles_video|num_video_frames_thumbnail|mm_projector_shuffle_num",
    _off,
    _HD,
    _OTHER,
)
_QUANTIZED = Rule(
    "quantization_config",
    _off,
    "the weights are said to be quantized, and are computed as they are stored",
    "Use the checkpoint from before it was quantized, or remove the key if it is that one",
)

CONFIG = (
    Rule("ps3.*|mm_low_res_token_num|mm_scale_num", _off, _HD, _OTHER),
    Rule("model_type|architectures", _free_of("topdown", "ps3", "gaze"), _HD, _OTHER),
    _AUTOGAZE,
    _QUANTIZED,
    Rule(
        "(mm_)?vision_tower",
        _free_of("clip", "internvit", "intern_vit", "radio", "ps3"),
        "the vision tower is not SigLIP",
        _OTHER,
    ),
    Rule("mm_use_im_start_end", _off, "no tokens are put around a picture", "Set it to false"),
    Rule("mm_vision_select_feature", _is("cls_patch"), "SigLIP has no class token to drop", "Set it to cls_patch"),
    Rule("min_tiles|video_max_tiles", _is(0, 1), "only 1 is supported", "Set it to 1"),
    Rule("time_token_format", _is("<t{t}>"), "time tokens have another name here", "Rename them to <t0>, <t1>, ..."),
)
"""The top `config.json`."""
TOWER = (
    Rule("model_type|architectures", _free_of("ps3", "gaze"), _HD, _OTHER),
    Rule("model_type", _is("siglip_vision_model"), "the vision tower is not SigLIP", _OTHER),
    Rule("architectures", _is(["SiglipVisionModel"], ["SiglipModel"]), "the vision tower is not SigLIP", _OTHER),
    Rule("num_channels", _is(3), "pictures have three colours", _OTHER),
    _AUTOGAZE,
    _QUANTIZED,
)
"""`vision_tower_cfg`."""
_WINDOWS = "attention in windows, which the reference computes with one kind of attention only"
DECODER = (
    Rule("model_type", _is("qwen2"), "the decoder is not Qwen2", _OTHER),
    Rule("use_sliding_window", _off, _WINDOWS, _OTHER),
    Rule("layer_types", _free_of("sliding"), _WINDOWS, _OTHER),
    _QUANTIZED,
)
"""`llm_cfg`."""
_PICTURES = "Pictures are prepared as NVILA's SigLIP was trained: correct the file, or use another checkpoint"
PROCESSOR = (
    Rule("image_mean|image_std", _is(HALF, tuple(HALF), 0.5), "another normalisation than 0.5", _PICTURES),
    Rule(
        "rescale_factor",
        lambda value: isinstance(value, float) and abs(value * 255 - 1) < 1e-6,
        "pixels are divided by 255",
        _PICTURES,
    ),
    Rule("do_normalize|do_rescale|do_resize", _is(True), "this step is always done", _PICTURES),
    Rule("do_center_crop|do_pad|do_flip_channel_order", _off, "this step is never done", _PICTURES),
    Rule(
        "image_processor_type",
        lambda value: str(value).startswith("SiglipImageProcessor"),
        "only SigLIP's processor is computed, whose defaults others do not share",
        _PICTURES,
    ),
    Rule("resample", _is(BICUBIC), "pictures are resized bicubically (3)", _PICTURES),
    _AUTOGAZE,
)
"""`preprocessor_config.json`."""


def refuse(content: Mapping[str, Any], rules: Sequence[Rule], where: str) -> None:
    """Go through a file's keys.

    Raises:
        ConfigError: the first key that asks for something else, by name, with its value.
    """
    for key, value in content.items():
        for rule in rules:
            if value is not None and re.fullmatch(rule.keys, key, re.IGNORECASE) and not rule.computed(value):
                raise ConfigError(rule.what, where=f"{where}: {key}", value=value, do=rule.do)


def check_size(size: Any, sides: Sequence[int], where: str) -> None:
    """Whether the `size` of `preprocessor_config.json` is square and one of `sides`: the tile's, or the last scale's.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(size, Mapping) and size.keys() == {"height", "width"} and size["height"] == size["width"]:
        size = size["height"]
    if size is not None and size not in sides:
        raise ConfigError(f"tiles have {sides[0]} pixels a side", where=f"{where}: size", value=size, do=_PICTURES)
