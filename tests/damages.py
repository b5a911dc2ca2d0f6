"""Damaged checkpoints of every layout, and what `nvila inspect`, `infer`, `convert` and `serve` make of each.

The whole matrix by hand, `python tests/damages.py`; a few of it by a seed in `test_damaged_checkpoints`. Each case runs
in a fork with bounds on its time and memory, and may end in two ways: as the sound checkpoint does, or refused with
exit code 2 by one message that names the checkpoint.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.data.sampling import Sampling
from nvila.components.model.checkpoint import native
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.native import save_native
from nvila.components.model.checkpoint.serving import serving_tensors, write_serving
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.fresh import init_model
from nvila.components.model.text.tokenizer import train_tokenizer

SECONDS = 10
"""A fork that takes longer hangs: the sound checkpoint takes less than one."""
BYTES = 2**30
"""Memory that a fork may take beside what it began with; of a toy of 0.2 MB."""
UNREADABLE = "not to be read"
COMMANDS = ("inspect", "infer", "convert", "serve")
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
LLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
DEEP: Any = json.loads("[" * 400 + "]" * 400)
VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "list": [1, "x", None],
    "object": {"x": 1},
    "false": False,
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "huge": 10**9,
    "enormous": 10**400,
    "nan": float("nan"),
    "infinite": float("inf"),
    "deep": DEEP,
    "long": "x" * 10**6,
}
OWN = {
    "vila": ("config.json", "qwen2.jinja"),
    "serving": ("config.json", "model.safetensors", "chat_template.jinja", "generation_config.json"),
    "packed": ("config.json", "model.safetensors"),
    "shards": ("llm/model-00001-of-00006.safetensors", "llm/model.safetensors.index.json"),
}
"""What is damaged of a layout that shares its other files with native or hf."""
MEDIA: list[Path] = []
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One damage of one checkpoint."""

    layout: str
    file: str
    what: str
    damage: Damage

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.layout}/{self.file}: {self.what}"


@dataclass(frozen=True)
class Ended:
    """How a command over a damaged checkpoint ended."""

    how: str
    """same, other (taken, with another result), refused, traceback, hang, memory, or unnamed (no file is named)."""
    says: str


def toys(folder: Path) -> dict[str, Path]:
    """One tiny model with random weights in every layout, in shards, and in 4 bits."""
    config = ModelConfig(
        vision=VISION | {"image_size": 28, "patch_size": 14},
        llm=LLM | {"vocab_size": 300, "intermediate_size": 64, "tie_word_embeddings": True},
        projector="mlp_downsample",
        vision_mode="dynamic_s2",
        s2_scales=(28, 56),
        s2_output_scale=-1,
        max_tiles=6,
        select_layer=-2,
        max_length_tokens=256,
        sampling=Sampling(4),
        video_pool_sizes=((1, 1, 1),),
    )
    tokenizer = train_tokenizer(["which digit is in row two"], 300)
    model = init_model(config, tokenizer, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # answers depend on the weights
    made = {layout: folder / layout for layout in ("native", "vila", "hf", "serving", "packed", "shards")}
    save_native(model, tokenizer, made["native"])
    for layout in ("vila", "hf", "serving"):
        convert(made["native"], made[layout], layout)
    write_serving(model, tokenizer, made["packed"], tensors=_packed(serving_tensors(model)), quantization=_SCHEME)
    whole, native.SHARD_BYTES = native.SHARD_BYTES, 20_000
    save_native(model, tokenizer, made["shards"])
    native.SHARD_BYTES = whole
    return made


_SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "targets": [r"re:llm\.model\.layers\.\d+\.mlp\.\w+_proj"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16},
        }
    },
    "ignore": ["lm_head"],
}


def _packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        if ".mlp." not in name or not name.startswith("llm."):
            made[name] = tensor
            continue
        stem, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        groups = tensor.float().view(rows, -1, 16)
        scale = groups.abs().amax(-1).clamp(min=1e-6) / 7
        values = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int64).view(rows, -1, 8) + 8
        words = (values << torch.arange(0, 32, 4)).sum(-1)
        made[f"{stem}.weight_packed"] = (words - (words >= 2**31) * 2**32).to(torch.int32)
        made[f"{stem}.weight_scale"] = scale.to(torch.bfloat16)
        made[f"{stem}.weight_shape"] = torch.tensor([rows, columns])
    return made


def cases(layout: str, folder: Path, seed: int) -> Iterator[Case]:
    """Every damage of a checkpoint; the seed decides where bits flip and which entries of long objects are damaged."""
    draw = random.Random(f"{seed} {layout}")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        damages = dict(_of_any(path, draw))
        if layout in OWN and file not in OWN[layout]:
            continue
        if path.suffix == ".json":
            damages |= dict(_of_json(path, draw))
        elif path.suffix == ".safetensors":
            damages |= dict(_of_weights(path, draw))
        if path.suffix in (".jinja", ".json"):
            damages |= dict(_of_templates(path))
        yield from (Case(layout, file, what, damage) for what, damage in damages.items())


def _of_any(path: Path, draw: random.Random) -> Iterator[tuple[str, Damage]]:
    def write(content: bytes) -> Damage:
        return lambda file: file.write_bytes(content) and None

    def instead(make: Callable[[Path], Any]) -> Damage:
        def damage(file: Path) -> None:
            file.unlink()
            make(file)

        return damage

    raw = path.read_bytes()
    place = draw.randrange(len(raw))
    flipped = raw[:place] + bytes([raw[place] ^ (1 << draw.randrange(8))]) + raw[place + 1 :]
    yield "missing", lambda file: file.unlink()
    yield "empty", write(b"")
    yield "cut off", write(raw[: len(raw) // 2])
    yield f"bit flipped at {place}", write(flipped)
    yield "reversed", write(raw[::-1])
    yield "with NUL", write(raw[: len(raw) // 2] + b"\0" * 8 + raw[len(raw) // 2 :])
    yield "not UTF-8", write(raw[:1] + b"\xff\xfe\xc3" + raw[1:])
    yield "a pipe", instead(os.mkfifo)
    yield "a folder", instead(lambda file: file.mkdir())
    yield "a device", instead(lambda file: file.symlink_to("/dev/zero"))
    yield "a link to itself", instead(lambda file: file.symlink_to(file.name))
    yield "a link to nowhere", instead(lambda file: file.symlink_to("nowhere"))
    yield "huge", lambda file: os.truncate(file, 40 * 2**30)
    yield UNREADABLE, lambda file: file.chmod(0)


def _of_json(path: Path, draw: random.Random) -> Iterator[tuple[str, Damage]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in VALUES.items():
        yield f"is {name}", _writing(value)
    key = next(iter(content), None)
    if key is not None:
        twice = json.dumps({key: content[key]})[:-1] + f", {json.dumps(key)}: 7" + "}"
        yield "a key twice", lambda file: file.write_text(twice) and None
    yield "deep beyond reading", lambda file: file.write_text("[" * 10**5 + "]" * 10**5) and None
    for keys in _places(content, draw):
        shown = ".".join(str(key) for key in keys)
        for name in draw.sample(["missing", *VALUES], 2 if path.name == "config.json" else 1):
            yield f"{shown} is {name}", _writing(_changed(content, keys, VALUES.get(name), missing=name == "missing"))


def _places(content: Any, draw: random.Random, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the values of a JSON, two of each long object or list."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    for key in keys if len(keys) <= 40 and isinstance(content, dict) else draw.sample(keys, min(2, len(keys))):
        yield (*above, key)
        if isinstance(content[key], dict | list) and len(above) < 3:
            yield from _places(content[key], draw, (*above, key))


def _changed(content: Any, keys: tuple[Any, ...], value: Any = None, *, missing: bool = False) -> Any:
    whole = json.loads(json.dumps(content))
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    if missing:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return whole


def write_key(path: Path, key: str, value: Any) -> None:
    """Set one key of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")


def _writing(content: Any) -> Damage:
    return lambda file: file.write_text(json.dumps(content), encoding="utf-8") and None


def _of_weights(path: Path, draw: random.Random) -> Iterator[tuple[str, Damage]]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def write(content: bytes | Any, values: bytes = data, stated: int | None = None) -> Damage:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        size = len(text) if stated is None else stated
        return lambda file: file.write_bytes(size.to_bytes(8, "little") + text + values) and None

    yield "header said to be enormous", write(header, stated=2**63)
    yield "header said to be 90 MB", write(header, stated=90 * 10**6)
    yield "header said to be short", write(header, stated=5)
    yield "header is a list", write([header])
    yield "header is deep", write(b"[" * 10**5 + b"]" * 10**5)
    yield "header is of spaces", write(b" " * 10**6)
    yield "bytes behind", write(header, data + b"xxxx")
    yield "no values", write(header, b"")
    infinite = torch.full((len(data) // 2,), float("inf"), dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    yield "values infinite", write(header, infinite + b"\0" * (len(data) - len(infinite)))
    names = [name for name in header if name != "__metadata__"]
    for name in draw.sample(names, min(3, len(names))):
        other = next(n for n in names if n != name) if len(names) > 1 else name
        entry = header[name]
        start, end = entry["data_offsets"]
        yield f"{name} missing", write({k: v for k, v in header.items() if k != name})
        yield f"{name} renamed", write({(f"{k}x" if k == name else k): v for k, v in header.items()})
        yield f"{name} swapped", write({**header, name: header[other], other: entry})
        changes: dict[str, Any] = {
            "of unknown dtype": {"dtype": "F1024"},
            "of whole numbers": {"dtype": "I32"},
            "of dtype null": {"dtype": None},
            "of a huge shape": {"shape": [2**40, 2**40]},
            "of a negative shape": {"shape": [-1, -4]},
            "of a text shape": {"shape": "x"},
            "of a flat shape": {"shape": [(end - start) // 4]},
            "overlapping": {"data_offsets": [max(0, start - 8), end - 8]},
            "beyond the file": {"data_offsets": [2**62, 2**62 + end - start]},
            "with offsets of texts": {"data_offsets": ["a", "b"]},
            "backwards": {"data_offsets": [end, start]},
        }
        for what, change in changes.items():
            yield f"{name} {what}", write({**header, name: entry | change})
        yield f"{name} is a number", write({**header, name: 3})


_LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "doubles": "{% set s = namespace(t='xxxxxxxx') %}{% for i in range(50) %}{% set s.t = s.t ~ s.t %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "repeats": "{{ 'x' * 99999999999 }}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "is nested": "{% if true %}" * 2000 + "{% endif %}" * 2000,
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "is not Jinja": "{% for",
    "is another's": "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}",
}


def _of_templates(path: Path) -> Iterator[tuple[str, Damage]]:
    if path.name == "tokenizer_config.json":
        content = json.loads(path.read_text(encoding="utf-8"))
        for what, template in _LOOPS.items():
            yield f"chat_template {what}", _writing(content | {"chat_template": template})
        named = [{"name": "default", "template": _LOOPS["loops"]}]
        yield "chat_template of a list loops", _writing(content | {"chat_template": named})
    elif path.suffix == ".jinja":
        for what, template in _LOOPS.items():
            yield f"template {what}", lambda file, template=template: file.write_text(template) and None  # type: ignore[misc]


def ends(
    case: Case, sound: dict[str, str], toy: Path, work: Path, commands: Sequence[str] = COMMANDS
) -> dict[str, Ended]:
    """What the commands make of a damaged copy of a toy, in a fork each."""
    place = work / "model"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(toy, place, symlinks=True)
    work.chmod(0o777)
    case.damage(place / case.file)
    if case.what != UNREADABLE:
        (work / "readable").touch()
    return {command: _judged(*_forked(command, place, work), sound.get(command), place) for command in commands}


def results(toy: Path, work: Path) -> dict[str, str]:
    """What the commands make of a sound checkpoint."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(toy, work / "model")
    (work / "readable").touch()
    made = {}
    for command in COMMANDS:
        how, says = _forked(command, work / "model", work)
        made[command] = f"{how} {says}"
    return made


def _judged(how: str, says: str, sound: str | None, place: Path) -> Ended:
    if how == "done":
        return Ended("same" if f"{how} {says}" == sound else "other", says)
    if how == "refused" and f"{how} {says}" == sound:
        return Ended("same", says)
    return Ended("unnamed" if how == "refused" and str(place) not in says else how, says)


def _forked(command: str, place: Path, work: Path) -> tuple[str, str]:
    out = work / "ended"
    out.unlink(missing_ok=True)
    began, pid = time.monotonic(), os.fork()
    if not pid:
        _child(command, place, out)
    while True:
        done, status, _ = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > SECONDS + 5:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    trace = out.with_suffix(".trace")
    if out.is_file():
        how, says = json.loads(out.read_text(encoding="utf-8"))
        return how, says
    says = trace.read_text(encoding="utf-8", errors="replace")[:3000] if trace.exists() else ""
    return ("hang" if "Timeout" in says else "memory" if os.WIFSIGNALED(status) else "traceback"), says or str(status)


def _child(command: str, place: Path, out: Path) -> None:
    with out.with_suffix(".trace").open("w") as trace, out.with_suffix(".stderr").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=trace)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        if os.geteuid() == 0 and not (out.parent / "readable").exists():
            os.seteuid(65534)  # for whom permissions count
        try:
            ended = ["done", _run(command, place, out.parent / "made")]
        except NvilaError as error:
            ended = ["refused" if error.exit_code == Exit.USER else "traceback", f"{type(error).__name__}: {error}"]
        except MemoryError:
            ended = ["memory", "MemoryError"]
        except BaseException as error:
            import traceback

            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if "/nvila/" in f.filename or "components/" in f.filename
            ]
            near = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else ""
            ended = [
                "traceback",
                f"{type(error).__name__}: {str(error)[:200]} at {near} ({last.filename}:{last.lineno})",
            ]
        if os.getuid() == 0:
            os.seteuid(0)
        out.write_text(json.dumps(ended), encoding="utf-8")
    os._exit(0)


def _run(command: str, place: Path, target: Path) -> str:
    from nvila.pipelines.commands.ask import Answering, Question, infer
    from nvila.pipelines.commands.checkpoints import inspect

    runs = place.parent / "runs"
    if command == "serve":
        return _serve(place, runs)
    if command == "inspect":
        return inspect(str(place), runs)[1]
    if command == "infer":
        media = [("image", MEDIA[0] / "picture.png"), ("video", MEDIA[0] / "frames")]
        pieces = infer(str(place), Question(["Which digit?"], media), Answering(12), runs)  # type: ignore[arg-type]
        return "".join(piece or "\n" for piece in pieces)
    convert(place, target, "serving")
    return hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()


def _serve(place: Path, runs: Path) -> str:
    """Up to where vLLM would be started."""
    from nvila.components.serve.ports import free_port
    from nvila.pipelines.commands.endpoint import serve

    os.environ["NVILA_SERVE_PYTHON"] = "/bin/sh"  # which everybody may run
    started = InterruptedError("started")
    envoy = patch("nvila.components.serve.interpreter.envoy", return_value=Path("/bin/sh"))
    with envoy, patch("subprocess.Popen", side_effect=started):
        try:
            serve(str(place), "127.0.0.1", free_port("127.0.0.1"), runs, None)
        except InterruptedError as error:
            if error is not started:
                raise
    return "started"


def prepare(folder: Path) -> dict[str, Path]:
    """The toys below `folder`, with a picture and a clip to ask about; the libraries are imported before any fork."""
    import numpy as np
    from PIL import Image

    import nvila.components.model.checkpoint.describe
    import nvila.components.model.checkpoint.loading
    import nvila.components.model.decode.answer
    import nvila.components.model.decode.structured
    import nvila.pipelines.commands.endpoint  # noqa: F401

    torch.set_num_threads(1)
    os.environ |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    folder.chmod(0o777)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    MEDIA[:] = [folder]
    (folder / "frames").mkdir()
    Image.fromarray(pixels).save(folder / "picture.png")
    for index in range(3):
        Image.fromarray(pixels[index:]).save(folder / f"frames/{index}.png")
    made = toys(folder / "toys")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "warm").mkdir()
    for command in ("inspect", "infer", "convert"):
        _run(command, made["native"], folder / "warm/made")
    return made


def main() -> int:
    """Run the matrix, print what did not end well and the counts."""
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th case from the i-th on")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="what a fork may take: more on a busy machine")
    parser.add_argument("--out", type=Path, help="a JSON line for each end")
    options = parser.parse_args()
    SECONDS = options.seconds
    first, step = (int(part) for part in options.share.split("/"))
    counts: Counter[str] = Counter()
    total = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = prepare(folder)
        sound = {layout: results(toy, folder / "work") for layout, toy in made.items()}
        every = [case for layout, toy in made.items() for case in cases(layout, toy, options.seed)]
        chosen = [case for case in every[first::step] if options.only in case.name]
        print(f"seed {options.seed}: {len(chosen)} of {len(every)} cases", flush=True)
        for case in chosen:
            total += 1
            for command, end in ends(case, sound[case.layout], made[case.layout], folder / "work").items():
                counts[end.how] += 1
                if end.how not in ("same", "refused", "other"):
                    print(f"{end.how}: {command} {case.name}: {end.says[-300:]}", flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps([case.name, command, end.how, end.says[:600]]) + "\n")
    print({"cases": total, **counts})
    return int(any(counts[how] for how in ("traceback", "hang", "memory", "unnamed")))


if __name__ == "__main__":
    sys.exit(main())
