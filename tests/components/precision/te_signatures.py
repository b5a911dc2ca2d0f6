"""Writes tests/golden/te-signatures.json: what Transformer Engine's functions and classes that we use take. By hand:

    pip download --no-deps --require-hashes -r requirements/transformer-engine.lock -d wheels
    .venv/bin/python tests/components/precision/te_signatures.py wheels/transformer_engine-*.whl

The wheel is read as text: importing it would need its kernels and a GPU.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LOCK = ROOT / "requirements" / "transformer-engine.lock"
GOLDEN = ROOT / "tests" / "golden" / "te-signatures.json"
WANTED = {
    "transformer_engine.pytorch": (
        "Linear",
        "autocast",
        "checkpoint",
        "is_fp8_available",
        "is_fp8_block_scaling_available",
    ),
    "transformer_engine.common.recipe": ("DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format"),
}


class Wheel:
    """The Python files of a wheel."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            self._texts = {name: archive.read(name).decode() for name in names}

    def tree(self, module: str) -> tuple[str, ast.Module]:
        """Its package, from which relative imports count, and its syntax."""
        plain = module.replace(".", "/")
        if f"{plain}.py" in self._texts:
            return module.rpartition(".")[0], ast.parse(self._texts[f"{plain}.py"])
        return module, ast.parse(self._texts[f"{plain}/__init__.py"])

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
        """Where a name is defined that a module has, and its definition; None where another package has it."""
        if not module.startswith("transformer_engine"):
            return None
        package, tree = self.tree(module)
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                        return self.find(".".join(filter(None, (above, node.module))), alias.name)
        return None


def parameters(function: ast.FunctionDef, *, method: bool) -> dict[str, Any]:
    """What may be given by place and by name, and what must be; of `**named` what the function itself takes out."""
    given = function.args
    by_place = [arg.arg for arg in given.posonlyargs + given.args][1 if method else 0 :]
    required = by_place[: len(by_place) - len(given.defaults)]
    required += [a.arg for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    popped = {
        str(call.args[0].value)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and (call.func.attr, ast.unparse(call.func.value)) == ("pop", given.kwarg.arg if given.kwarg else "")
        and isinstance(call.args[0], ast.Constant)
    }
    return {
        "by_place": by_place,
        "any_number": given.vararg is not None,
        "by_name": sorted({*by_place, *(arg.arg for arg in given.kwonlyargs), *popped}),
        "required": required,
    }


def described(wheel: Wheel, module: str, name: str) -> dict[str, Any]:
    """A function by its parameters; a class by those of its constructor and methods, its attributes and members."""
    found = wheel.find(module, name)
    assert found, f"{module} has no {name}"
    where, node = found
    if isinstance(node, ast.FunctionDef):
        return {"call": parameters(node, method=False)}
    methods: dict[str, Any] = {}
    attributes: set[str] = set()
    keys: set[str] = set()
    fields: list[tuple[str, bool]] = []
    for _, kind in ancestry(wheel, where, node):
        for item in kind.body:
            if isinstance(item, ast.FunctionDef) and item.name not in methods:
                methods[item.name] = parameters(item, method=True)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                fields.append((item.target.id, item.value is None))
            elif isinstance(item, ast.Assign):
                attributes |= {target.id for target in item.targets if isinstance(target, ast.Name)}
        attributes |= _set_on_self(kind)
        keys |= _keys(kind)
    call = methods.pop("__init__", None) or {
        "by_place": [field for field, _ in fields],
        "any_number": False,
        "by_name": sorted(field for field, _ in fields),
        "required": [field for field, needed in fields if needed],
    }
    public = {method: takes for method, takes in methods.items() if not method.startswith("__")}
    told = {"call": call, "methods": public, "attributes": sorted(attributes)}
    return told | ({"fp8_meta": sorted(keys)} if keys else {})


def ancestry(wheel: Wheel, module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
    """A class and those of the wheel that it is made of, the nearest first."""
    found = [(module, node)]
    for base in node.bases:
        above = wheel.find(module, ast.unparse(base)) if isinstance(base, ast.Name) else None
        if above and isinstance(above[1], ast.ClassDef):
            found += ancestry(wheel, above[0], above[1])
    return found


def _set_on_self(kind: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def _keys(kind: ast.ClassDef) -> set[str]:
    """Of the dictionary in which a module keeps its scales."""
    return {
        str(node.slice.value)
        for node in ast.walk(kind)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) in ("self.fp8_meta", "meta")
        and isinstance(node.slice, ast.Constant)
    }


def main() -> int:
    """Hold the wheel against the lock, and write."""
    path = Path(sys.argv[1])
    digest = sha256(path.read_bytes()).hexdigest()
    if f"sha256:{digest}" not in LOCK.read_text(encoding="utf-8"):
        print(f"{path} is not the release of {LOCK}", file=sys.stderr)
        return 1
    wheel = Wheel(path)
    modules = {module: {name: described(wheel, module, name) for name in names} for module, names in WANTED.items()}
    state = wheel.find("transformer_engine.pytorch.quantization", "DelayedScalingRecipeState")
    assert state and isinstance(state[1], ast.ClassDef)
    content = {
        "wheel": path.name,
        "sha256": digest,
        "modules": modules,
        "delayed_state": sorted(_set_on_self(state[1])),
    }
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
