"""Every use of Transformer Engine in our source against the signatures of the locked release: here it cannot run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from te_signatures import GOLDEN, LOCK, ROOT

from nvila.components.precision import by_transformer_engine

SOURCE = ROOT / "components" / "precision" / "by_transformer_engine.py"
KNOWN = json.loads(GOLDEN.read_text(encoding="utf-8"))
LINEAR = KNOWN["modules"]["transformer_engine.pytorch"]["Linear"]


def faults(text: str) -> list[str]:
    """What the release would not take of a module's source."""
    return list(_Uses(ast.parse(text)).faults())


class _Uses:
    """The names of a module that are Transformer Engine's, and where they are used."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._modules: dict[str, dict[str, Any]] = {}
        self._names: dict[str, dict[str, Any] | None] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("transformer_engine"):
                        self._modules[alias.asname or alias.name] = KNOWN["modules"].get(alias.name, {})
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine"):
                there = KNOWN["modules"].get(node.module, {})
                self._names |= {alias.asname or alias.name: there.get(alias.name) for alias in node.names}

    def faults(self) -> Iterator[str]:
        """All of them."""
        yield from (f"{name} is not imported from there" for name, known in self._names.items() if known is None)
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in self._modules:
                if node.attr not in self._modules[ast.unparse(node.value)]:
                    yield f"there is no {ast.unparse(node)}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in self._names:
                known = self._names[ast.unparse(node.value)]
                if known and node.attr not in {*known["attributes"], *known["methods"]}:
                    yield f"there is no {ast.unparse(node)}"
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            elif isinstance(node, ast.ClassDef):
                yield from _inside(node)

    def _call(self, node: ast.Call) -> Iterator[str]:
        function, given = node.func, node.args
        if ast.unparse(function) == "partial":
            function, given = given[0], given[1:]
        known = self._named(function)
        if known:
            whole = ast.unparse(node.func) != "partial"
            yield from _against(ast.unparse(function), known["call"], given, node.keywords, whole=whole)

    def _named(self, function: ast.expr) -> dict[str, Any] | None:
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) in self._modules:
            return self._modules[ast.unparse(function.value)].get(function.attr)
        return self._names.get(ast.unparse(function))


def _inside(kind: ast.ClassDef) -> Iterator[str]:
    """A class of that module that is a Linear: what it calls of its base, and what it reads of itself."""
    import torch

    if kind.name != "Linear":
        return
    own = set(dir(torch.nn.Module)) | {"over", "weight", "bias"}
    for node in ast.walk(kind):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cls":
            yield from _against("Linear", LINEAR["call"], node.args, node.keywords)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = LINEAR["methods"].get(node.func.attr)
            if method and ast.unparse(node.func.value) in ("self", "super()"):
                yield from _against(f"Linear.{node.func.attr}", method, node.args, node.keywords)
        known = {*LINEAR["methods"], *LINEAR["attributes"], *own}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "made") and node.attr not in known:
            yield f"a Linear has no {node.attr}"


def _against(
    name: str, takes: dict[str, Any], given: list[ast.expr], keywords: list[ast.keyword], *, whole: bool = True
) -> Iterator[str]:
    """A call against what is taken; of one that is not `whole` more may follow."""
    if len(given) > len(takes["by_place"]) and not takes["any_number"]:
        yield f"{name} takes {len(takes['by_place'])} arguments by place, not {len(given)}"
    named = [keyword.arg for keyword in keywords if keyword.arg]
    yield from (f"{name} has no parameter {one}" for one in named if one not in takes["by_name"])
    missing = set(takes["required"]) - set(takes["by_place"][: len(given)]) - set(named)
    if missing and whole:
        yield f"{name} lacks {', '.join(sorted(missing))}"


def test_every_call_is_one_that_the_release_takes() -> None:
    """A wrong keyword would be found by the first stage on a GPU, after the data and the base model are made."""
    users = [
        path
        for root in ("components", "pipelines", "infra")
        for path in (ROOT / root).rglob("*.py")
        if "import transformer_engine" in (text := path.read_text(encoding="utf-8"))
        or "from transformer_engine" in text
    ]
    assert users == [SOURCE]
    assert faults(SOURCE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("is_first_microbatch=", "is_first_micro_batch=", "Linear.forward has no parameter is_first_micro_batch"),
        ("amax_reduction_group=", "fp8_group=", "te.autocast has no parameter fp8_group"),
        ("params_dtype=", "dtype=", "Linear has no parameter dtype"),
        ("linear.in_features,\n", "\n", "Linear lacks out_features"),
        ("te.checkpoint,", "te.checkpointed,", "there is no te.checkpointed"),
        ("use_reentrant=False", "reentrant=False", "te.checkpoint has no parameter reentrant"),
        ("return_reason=True", "True, True", "takes 1 arguments by place, not 2"),
        ("reduce_amax=", "reduce_amaxes=", "DelayedScaling has no parameter reduce_amaxes"),
        ("Format.HYBRID", "Format.MIXED", "there is no Format.MIXED"),
        ("import DelayedScaling,", "import Delayed,", "Delayed is not imported from there"),
        ("self.fp8_meta", "self.fp8_state", "a Linear has no fp8_state"),
        ("init_fp8_meta_tensors(recipe)", "init_fp8_meta_tensors()", "init_fp8_meta_tensors lacks recipe"),
    ],
)
def test_what_the_release_does_not_take_is_found(right: str, wrong: str, said: str) -> None:
    """A check that lets everything pass would be believed."""
    text = SOURCE.read_text(encoding="utf-8")
    assert right in text
    found = faults(text.replace(right, wrong))
    assert any(said in fault for fault in found), found


def test_scales_lie_where_the_release_keeps_them() -> None:
    """They go into the checkpoint from its own tables, whose names no signature tells."""
    assert set(by_transformer_engine.BUFFERS) <= set(KNOWN["delayed_state"])
    assert {f"scaling_{way}" for way in by_transformer_engine.WAYS} | {"recipe", "num_gemms"} <= set(LINEAR["fp8_meta"])


def test_the_signatures_are_those_of_the_locked_release() -> None:
    """Ours might be held against another."""
    assert f"sha256:{KNOWN['sha256']}" in LOCK.read_text(encoding="utf-8")
    version = Path(KNOWN["wheel"]).name.split("-")[1]
    assert f"transformer-engine=={version} " in LOCK.read_text(encoding="utf-8")
