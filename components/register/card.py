"""The model card: Markdown that says what the model can do, what it was made from and how it was quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvila.components.contracts.manifest import Manifest
from nvila.components.metrics.standing import headline


def model_card(name: str, inputs: Mapping[str, Manifest]) -> str:
    """Card of the model.

    Args:
        name: in the registry.
        inputs: `model`, `metrics`, `full`, `samples`, as `register` gets them.
    """
    full, quantized = inputs["full"].values["accuracy"], inputs["metrics"].values["accuracy"]
    said = headline(full, quantized).text
    parts = [
        f"# {name}",
        "A vision-language model after NVILA (scale then compress): question and picture or clip in, short answer out.",
        "## Accuracy",
        f"**{said[0].upper()}{said[1:]}**",
        "Exact match on held-out questions with 95% intervals. *Without the picture* is the best score that any of the "
        "baselines reaches which do not see the right picture.",
        _table(
            ["source", "questions", "most common answer", "without the picture", "full model", "quantized"],
            [_accuracy_row(source, full.get(source, {}), measured) for source, measured in quantized.items()],
        ),
        *_data(inputs["samples"]),
        *_quantization(inputs["model"]),
        "## Limits",
        "Answers only what its training sources ask; other questions and other kinds of pictures were not measured.",
        "## Lineage",
        "\n".join(f"- {step}: `{manifest.digest}`" for step, manifest in inputs.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy_row(source: str, full: Mapping[str, Any], quantized: Mapping[str, Any]) -> list[str]:
    only = full.get("question_only", {})
    blind = f"{_interval(only)}, {only.get('kind', '')}" if only else "-"
    majority = f"{full['majority']:.3f}" if "majority" in full else "-"
    return [source, str(quantized.get("n", "-")), majority, blind, _interval(full), _interval(quantized)]


def _interval(measured: Mapping[str, Any]) -> str:
    if "accuracy" not in measured:
        return "-"
    text = f"{measured['accuracy']:.3f}"
    return f"{text} ({measured['low']:.3f} to {measured['high']:.3f})" if "low" in measured else text


def _data(samples: Manifest) -> list[str]:
    counts: Mapping[str, Mapping[str, int]] = samples.values.get("records", {})
    if not counts:
        return []
    splits = list(dict.fromkeys(split for of in counts.values() for split in of))
    rows = [[source, *(str(of.get(split, 0)) for split in splits)] for source, of in counts.items()]
    set_aside = sum(samples.values.get("quarantined", {}).values())
    return ["## Data", _table(["source", *splits], rows), f"{set_aside} spoilt records were set aside."]


def _quantization(model: Manifest) -> list[str]:
    values = model.values
    lines = [f"- {scheme}: {count} linear layers" for scheme, count in values.get("linears", {}).items()]
    if values.get("bytes_before") and values.get("bytes_after"):
        lines.append(f"- {values['bytes_before']} bytes before, {values['bytes_after']} after")
    return ["## Quantization", "\n".join(lines)] if lines else []


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
