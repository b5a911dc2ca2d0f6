"""Step `quantize`: the trained model as one compressed-tensors checkpoint in serving form; paper section 2.5.

Vision tower W8A8 after SmoothQuant, decoder W4A16 by GPTQ, AWQ or rounding; projector, embeddings and lm_head bf16.
What vLLM makes of the checkpoint is measured by the next step, not here.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.manifest import Manifest, write_atomic
from nvila.components.contracts.progress import track
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.step import Outcome
from nvila.components.quantize.plan import PLAIN, UNUSED, Group, groups, linears, module_map

if TYPE_CHECKING:
    import torch

    from nvila.components.model.batch import Batch
    from nvila.components.model.nvila import NVILA

MODULE_MAP = "module_map.json"


class Settings(Section):
    """Slice of `quantize`."""

    quantize: QuantizeSettings
    seed: int
    max_skipped_share: float = 0.01


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Write `model/` (serving form) and `module_map.json` (every Linear and its scheme).

    Args:
        settings: schemes, method and calibration.
        inputs: `model` (of the last training stage) and `samples` (of validate).
        out: the step's folder.

    Raises:
        ConfigError: `group_size` does not fit the model.
        QuantizationError: a pattern matches nothing, or a Linear is not accounted for.
    """
    import torch

    from nvila.components.model.checkpoint import load_native
    from nvila.components.model.serving import serving_tensors, write_serving
    from nvila.components.quantize.compress import quantization_config

    began = time.monotonic()
    wanted = settings.quantize
    checkpoint = inputs["model"].dir("model")
    model, tokenizer = load_native(checkpoint, dtype="float32")
    schemes = module_map(linears(model), wanted)
    write_atomic(out / MODULE_MAP, json.dumps(schemes, indent=1, sort_keys=True) + "\n")
    before = sum(tensor.numel() for tensor in serving_tensors(model).values()) * torch.bfloat16.itemsize

    torch.manual_seed(settings.seed)
    batches, skipped = _calibration(model, tokenizer, inputs["samples"], settings)
    packed: dict[str, torch.Tensor] = {}
    # The decoder first: its calibration runs the tower, which cannot run any more once it is packed.
    for group in track(groups(wanted)[::-1], "quantizing"):
        names = [name for name, scheme in schemes.items() if scheme != UNUSED and re.match(group.pattern, name)]
        packed |= _quantize(model, names, group, wanted, batches, checkpoint)
    plain = [name for name, scheme in schemes.items() if scheme == PLAIN]
    config = quantization_config(groups(wanted), wanted, plain) if groups(wanted) else None
    after = write_serving(
        model, tokenizer, out / "model", tensors=_replace(serving_tensors(model), packed, schemes), quantization=config
    )
    return Outcome(
        kind="model",
        values={
            "bytes_before": before,
            "bytes_after": after,
            "linears": dict(sorted(Counter(schemes.values()).items())),
            "method": wanted.method,
            "group_size": wanted.group_size,
            "calibration_samples": len(batches),
            "skipped": skipped,
        },
        files=("model/*", MODULE_MAP),
        measured={"seconds": time.monotonic() - began},
    )


def _calibration(
    model: NVILA, tokenizer: Any, samples: Manifest, settings: Settings
) -> tuple[list[Batch], dict[str, Any]]:
    """Training samples, one to a batch, and what was skipped of them.

    Raises:
        DataError: too many of them cannot be used.
    """
    from nvila.components.data.samples import read_samples
    from nvila.components.data.skipped import Tally
    from nvila.components.model.feed import Feed
    from nvila.components.quantize.calibrate import choose_samples

    known = read_samples(samples.path("samples.parquet"), split="sft")
    chosen = choose_samples(known, settings.quantize.calibration_samples, settings.seed)
    tally = Tally("calibration", len(chosen), settings.max_skipped_share)
    batches = list(Feed(tokenizer, model.config).batches(chosen, 1))
    tally.add(one for batch in batches for one in batch.skipped)
    return [batch for batch in batches if batch.samples], tally.summary()


def _quantize(
    model: NVILA,
    names: list[str],
    group: Group,
    settings: QuantizeSettings,
    batches: list[Batch],
    checkpoint: Path,
) -> dict[str, torch.Tensor]:
    """Compressed tensors of one part, by serving name."""
    from nvila.components.model.serving import LLM, TOWER
    from nvila.components.quantize.calibrate import decoder_batches, tower_batches
    from nvila.components.quantize.compress import quantize_part
    from nvila.components.quantize.smooth import smooth_tower

    if group.name == "vision_tower":
        if settings.smoothquant_alpha > 0:
            smooth_tower(model, tower_batches(batches), settings.smoothquant_alpha)
        return quantize_part(
            model.vision_tower, TOWER, names, group, settings, [], checkpoint / "vision_tower"
        )  # inputs are rounded at run time
    calibration = [] if settings.method == "rtn" else decoder_batches(model, batches)
    return quantize_part(model.llm, LLM, names, group, settings, calibration, checkpoint / "llm")


def _replace(
    tensors: Mapping[str, torch.Tensor], packed: Mapping[str, torch.Tensor], schemes: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors: a quantized Linear's are the packed ones alone, everything else is plain."""
    quantized = {name for name, scheme in schemes.items() if scheme not in (PLAIN, UNUSED)}
    plain = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in quantized}
    return plain | dict(packed)
