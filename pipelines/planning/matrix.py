"""`nvila plan --matrix`: every way to train a stage, and what does not go together, from the recipe's own rules."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.recipe.matrix import RULES, Cell, Rule, axes, cells, refusals
from nvila.pipelines.show.watch import print_line

ROWS, COLUMNS = ("llm", "precision"), ("zero", "offload")
ELSEWHERE = "fp8-delayed and fp8-block need an NVIDIA GPU with Transformer Engine: docs/fp8.md"


def as_json() -> dict[str, Any]:
    """For programs: each cell with the numbers of the rules that refuse it."""
    found = [asdict(cell) | {"refused_by": [RULES.index(rule) + 1 for rule in refusals(cell)]} for cell in cells()]
    return {"rules": dict(rules()), "cells": found, "remark": ELSEWHERE}


def rules() -> Iterator[tuple[int, str]]:
    """Each rule's number and reason."""
    return ((number, rule.why) for number, rule in enumerate(RULES, 1))


def grid() -> Iterator[tuple[str, ...]]:
    """Lines of the table, its head first: `yes`, or the numbers of the rules that refuse; with `some` where it depends
    on how the tower learns or rows are packed."""
    named = axes()
    heads = list(itertools.product(*(named[axis] for axis in COLUMNS)))
    yield (*ROWS, *(f"zero {zero}" + (f", offload {offload}" if offload != "none" else "") for zero, offload in heads))
    broken = defaultdict(list)
    for cell in cells():
        broken[_at(cell, ROWS), _at(cell, COLUMNS)].append(refusals(cell))
    for row in itertools.product(*(named[axis] for axis in ROWS)):
        yield (*map(str, row), *(_told(broken[row, at]) for at in heads))


def summary() -> str:
    """How many there are, and how many are allowed."""
    found = [not refusals(cell) for cell in cells()]
    options = {name: len(options) for name, options in axes().items()}
    return (
        f"{' x '.join(f'{count} {name}' for name, count in options.items())}: {sum(found):,} of {len(found):,} allowed"
    )


def show(console: Console) -> None:
    """For a person."""
    head, *lines = grid()
    shown = Table(*head, box=None, pad_edge=False, title=summary(), title_justify="left")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    for number, why in rules():
        print_line(console, f"{number}: {why}")
    print_line(console, ELSEWHERE)


def _at(cell: Cell, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(cell, name) for name in names)


def _told(broken: list[list[Rule]]) -> str:
    numbers = ", ".join(str(n) for n, rule in enumerate(RULES, 1) if any(rule in one for one in broken))
    if not numbers:
        return "yes"
    return numbers if all(broken) else f"some: {numbers}"
