"""Writes the state machine of docs/promotion.md out of its own table: a part of `make docs`."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.manifest import write_atomic
from nvila.infra.controller.decide import RULES
from nvila.pipelines.show.readme import fill, table

PAGE = Path("docs/promotion.md")


def rules() -> str:
    """Each rule in the order in which they are tried."""
    rows = [
        (
            rule.name,
            ", ".join(rule.before) or "any",
            rule.when,
            rule.then,
            "waits" if rule.registry else "goes on",
            "goes on" if rule.paused else "waits",
        )
        for rule in RULES
    ]
    return table(("rule", "in", "when", "then", "while MLflow is away", "while paused"), rows)


def drawing() -> str:
    """The phases and what leads from one to the next, as a diagram."""
    lines = ["[*] --> Empty", "Preparing --> Asking: its pods are ready"]
    for rule in RULES:
        lines += [f"{phase} --> {rule.after}: {rule.name}" for phase in rule.before or _ANY if rule.after]
    return "\n".join(["```mermaid", "stateDiagram-v2", *(f"    {line}" for line in lines), "```"])


_ANY = ("Empty", "Serving", "Preparing", "Asking", "Shifting")
TABLES = {"drawing": drawing, "rules": rules}

if __name__ == "__main__":
    write_atomic(PAGE, fill(PAGE.read_text(encoding="utf-8"), TABLES))
