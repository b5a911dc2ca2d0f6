"""From one checkpoint layout to another in little memory: tensors are copied in pieces, never loaded whole.

The result appears under its name when it is complete. An interrupted conversion goes on where it stopped: finished
files in `DST.partial` are kept as long as the same source is converted to the same layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.foreign import reading
from nvila.components.contracts.manifest import digest_json, write_atomic
from nvila.components.contracts.progress import track
from nvila.components.model.checkpoint.flat import hf_config, open_checkpoint
from nvila.components.model.checkpoint.layouts import LAYOUTS, PARTS, Checkpoint, Layout
from nvila.components.model.checkpoint.native import (
    SHARD_BYTES,
    checked,
    generation_config,
    image_processor,
    write_native_files,
)
from nvila.components.model.checkpoint.serving import is_served, require_servable, write_serving_files
from nvila.components.model.checkpoint.tensorfile import CODES, DTYPES, Stored, Target, file_bytes, values, write_file
from nvila.components.model.checkpoint.weights import TOWER, tied, wanted
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.tokenizer import template_name, written_template

PLAN = ".plan"
"""In an unfinished folder: digest of what is being converted."""


@dataclass(frozen=True)
class Converted:
    """What a conversion has made."""

    folder: Path
    source: Layout
    tensors: int
    bytes: int


def convert(source: Path, target: Path, layout: str, *, dtype: str | None = None) -> Converted:
    """Write the checkpoint `source` to the new folder `target` in another layout.

    Args:
        source: a folder in any layout.
        target: must not exist.
        layout: native, vila, hf or serving.
        dtype: float32, bfloat16 or float16; by default as stored, and bfloat16 for serving.

    Raises:
        ConfigError: no such layout or dtype, `target` exists, or the model has no place in the layout.
        DataError: the source is broken, incomplete or quantized, or a value is not finite or too large for `dtype`.
    """
    if layout not in LAYOUTS:
        raise ConfigError("no such layout", where="--to", value=layout, do=f"Use one of {', '.join(LAYOUTS)}")
    if target.exists():
        raise ConfigError("is there already", where=str(target), do="Name a new folder")
    code = _code(dtype, layout)
    checkpoint = open_checkpoint(source)
    _require_convertible(checkpoint, layout)
    skeleton, tokenizer, tensors = checked(checkpoint)
    files = _files(tensors, skeleton, layout, code)
    partial = target.with_name(target.name + ".partial")
    _start(partial, _plan(files, layout))
    _read_what_is_left_out(tensors, files)
    for name, targets in track(list(files.items()), "files"):
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.stat().st_size != file_bytes(targets):
            write_file(path, targets)
    _write_index(partial, files)
    _write_rest(skeleton, checkpoint.layout, layout, tokenizer, partial, files)
    (partial / PLAN).unlink()
    partial.rename(target)
    everything = [tensor for targets in files.values() for tensor in targets]
    return Converted(target, checkpoint.layout, len(everything), sum(tensor.bytes for tensor in everything))


def _code(dtype: str | None, layout: str) -> str | None:
    """Code of the floating-point dtype to write; None keeps what is stored."""
    if dtype is None:
        return "BF16" if layout == "serving" else None
    wanted = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    if dtype not in wanted:
        raise ConfigError("unknown dtype", where="--dtype", value=dtype, do=f"Use one of {', '.join(wanted)}")
    return wanted[dtype]


def _require_convertible(checkpoint: Checkpoint, layout: str) -> None:
    where = str(checkpoint.folder)
    if any(name.endswith(".weight_scale") for name in checkpoint.tensors):
        raise DataError("a quantized checkpoint cannot be converted", where=where, do="Use the one it was made from")
    if checkpoint.layout == "serving" and layout != "serving":
        raise DataError(
            "a serving folder lacks the tower's unused blocks and cannot be turned back",
            where=where,
            do="Use the checkpoint that it was made from",
        )
    with reading(checkpoint.folder):  # now, not when hours of copying are over
        if layout == "serving":
            require_servable(checkpoint.config)
        elif layout == "hf":
            hf_config(checkpoint.config, 0, 0)


def _files(tensors: Mapping[str, Stored], model: NVILA, layout: str, code: str | None) -> dict[str, list[Target]]:
    """What goes into which file of the result."""
    flat = layout in ("hf", "serving")
    groups: dict[str, list[Target]] = {part: [] for part in ([""] if flat else PARTS)}
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted(model).items()}
    for name, stored in tensors.items():
        tower = name.startswith(TOWER)
        if layout == "serving" and tower and not is_served(name.removeprefix("vision_tower."), model.config):
            continue
        folder, written = ("", name) if flat else (name.partition(".")[0], name.partition(".")[2])
        groups[folder].append(Target(written, stored, code or stored.code, shapes[name]))
    return {path: part for folder, targets in groups.items() for path, part in _shards(folder, targets).items()}


def _read_what_is_left_out(tensors: Mapping[str, Stored], files: Mapping[str, list[Target]]) -> None:
    """Damage is refused wherever it lies: a checkpoint that has some is not one to serve.

    Raises:
        DataError: a value of a tensor that goes into no file is not finite.
    """
    written = {target.source for targets in files.values() for target in targets}
    for name, stored in tensors.items():
        if stored not in written:
            for _ in values(stored, name, stored.elements, DTYPES[stored.code]):
                pass


def _shards(folder: str, targets: list[Target]) -> dict[str, list[Target]]:
    """Files of at most `SHARD_BYTES`, tensors in the order of the source."""
    shards: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if size and size + target.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.bytes
    prefix = f"{folder}/" if folder else ""
    if len(shards) == 1:
        return {f"{prefix}model.safetensors": shards[0]}
    return {f"{prefix}model-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}


def _plan(files: Mapping[str, list[Target]], layout: str) -> str:
    """Digest of the sources (place, size, time) and of what becomes of them."""
    stats = {str(t.source.path): t.source.path.stat() for part in files.values() for t in part}
    return digest_json(
        {
            "layout": layout,
            "sources": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
            "files": {
                name: [[t.name, t.code, list(t.shape), t.source.start] for t in part] for name, part in files.items()
            },
        }
    )


def _start(partial: Path, plan: str) -> None:
    """Keep the finished files of an earlier attempt at the same plan, and nothing of another."""
    mark = partial / PLAN
    if partial.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != plan):
        raise ConfigError(
            "holds something else than the beginning of this conversion", where=str(partial), do="Remove it first"
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_atomic(mark, plan)


def _write_index(partial: Path, files: Mapping[str, list[Target]]) -> None:
    """`model.safetensors.index.json` beside each set of shards."""
    sharded: dict[str, dict[str, list[Target]]] = {}
    for name, targets in files.items():
        folder, _, file = name.rpartition("/")
        if file != "model.safetensors":
            sharded.setdefault(folder, {})[file] = targets
    for folder, shards in sharded.items():
        total = sum(target.bytes for targets in shards.values() for target in targets)
        weight_map = {target.name: file for file, targets in shards.items() for target in targets}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(partial / folder / "model.safetensors.index.json", content)


def _write_rest(
    model: NVILA, source: Layout, layout: str, tokenizer: Any, partial: Path, files: Mapping[str, list[Target]]
) -> None:
    """Configurations and tokenizer of the layout; the model is on the meta device."""
    config, tokens = model.config, model.tokens
    largest = max((target for targets in files.values() for target in targets), key=lambda t: math.prod(t.shape))
    dtype = next(dtype for dtype, code in CODES.items() if code == largest.code)
    if layout == "serving":
        write_serving_files(model, tokenizer, partial, dtype, config=config)
    elif layout == "hf":
        content = hf_config(config, tokens.image, tokens.video)
        named = {
            "dtype": str(dtype).removeprefix("torch."),
            "tie_word_embeddings": tied(config),
        }
        tokenizer.save_pretrained(partial)
        (partial / "chat_template.jinja").write_text(written_template(tokenizer), encoding="utf-8")
        _write_json(partial / "generation_config.json", config.generation or generation_config(tokenizer))
        _write_json(partial / "preprocessor_config.json", image_processor(config.tile_pixels))
        _write_json(partial / "config.json", content | named | {"model_dtype": str(dtype)})
    else:
        write_native_files(config, tokenizer, partial, str(dtype))
        if layout == "vila":
            native = json.loads((partial / "config.json").read_text(encoding="utf-8"))
            _write_json(partial / "config.json", _vila_config(native))
            if name := template_name(tokenizer):  # the remote code looks for the named file here
                template = written_template(tokenizer, literal_media=True)
                (partial / f"{name}.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _vila_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """A native top `config.json` as the remote code's; the code itself is not part of what we write."""
    code = {"AutoModel": "VILAForCausalLM", "AutoModelForCausalLM": "VILAForCausalLM", "AutoConfig": "VILAConfig"}
    return {
        **content,
        "version": "2.0",
        "architectures": ["VILAForCausalLM"],
        "model_type": "vila",
        "auto_map": {key: f"modeling_vila.{name}" for key, name in code.items()}
        | {"AutoProcessor": "auto_processor.VILAProcessor"},
    }
