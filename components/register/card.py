"""The model card: Markdown that says what the model can do, what it was made from and how it was quantized."""

from __future__ import annotations

from collections.abc import Mapping

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.metrics import named
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.results.model import Initialization, Pruning, Quantization, Validation
from nvila.components.contracts.results.result import Measured
from nvila.components.contracts.steps import PRUNES
from nvila.components.metrics.pruned import believed, what_stays
from nvila.components.metrics.standing import Compared, compared, headline, what_was_measured
from nvila.components.tracking.columns import DESCRIPTION, excerpt


def model_card(name: str, inputs: Mapping[str, Manifest]) -> str:
    """Card of the model, in the length that the registry takes.

    Args:
        name: in the registry.
        inputs: `model`, `metrics`, `full`, `samples`, as `register` gets them.
    """
    return excerpt(whole_card(name, inputs), DESCRIPTION, "the whole card is a file of the source run")


def whole_card(name: str, inputs: Mapping[str, Manifest]) -> str:
    """The card, however many sources there are; arguments as of `model_card`."""
    full, quantized = inputs["full"].told(Evaluation), inputs["metrics"].told(QuantizedEvaluation)
    said, sources = headline(full, quantized).text, compared(full, quantized)
    tuned = any(m.base for m in sources.values())
    parts = [
        f"# {name}",
        "A vision-language model after NVILA (scale then compress): question and picture or clip in, short answer out.",
        "## Accuracy",
        f"**{said[0].upper()}{said[1:]}**",
        f"{what_was_measured(sources.values())} on held-out questions with 95% intervals. *Without the picture* is the "
        "best score that any of the baselines reaches which do not see the right picture.",
        _table(
            [
                *("source", "questions", "most common answer", "without the picture"),
                *(("before tuning",) if tuned else ()),
                *("full model", "quantized"),
            ],
            [_accuracy_row(source, m, tuned) for source, m in sources.items() if m.quantized],
        ),
        *_start(inputs["model"]),
        *_data(inputs["samples"].told(Validation)),
        *_pruning(inputs["model"]),
        *_quantization(inputs["model"].told(Quantization)),
        "## Limits",
        "Answers only what its training sources ask; other questions and other kinds of pictures were not measured.",
        "## Lineage",
        "\n".join(f"- {step}: `{manifest.digest}`" for step, manifest in inputs.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy_row(source: str, m: Compared, tuned: bool) -> list[str]:
    blind = f"{_interval(m.question_only)}, {m.question_only.kind}"
    questions = m.quantized.n if m.quantized else m.full.n
    return [
        named(source, m.full.metric),
        str(questions),
        f"{m.majority.value:.3f}",
        blind,
        *((_interval(m.base),) if tuned else ()),
        _interval(m.full),
        _interval(m.quantized),
    ]


def _start(model: Manifest) -> list[str]:
    """The whole model that training started from, where there was one."""
    while "model" in model.inputs:
        model = model.origin("model")
    told = model.result
    if not isinstance(told, Initialization) or told.start is None:
        return []
    version = (told.weights or {}).get("model", {})
    named = [f"{key} `{version[key]}`" for key in ("version", "digest", "commit") if key in version]
    return ["## Start", f"Fine-tuned from `{told.start}`{': ' if named else ''}{', '.join(named)}."]


def _interval(measured: Measured | None) -> str:
    return f"{measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f})" if measured else "-"


def _data(samples: Validation) -> list[str]:
    splits = list(dict.fromkeys(split for of in samples.records.values() for split in of))
    rows = [[source, *(str(of.get(split, 0)) for split in splits)] for source, of in samples.records.items()]
    set_aside = sum(samples.quarantined.values())
    return ["## Data", _table(["source", *splits], rows), f"{set_aside} spoilt records were set aside."]


def _pruning(model: Manifest) -> list[str]:
    """What each prune step left of the data that the model was trained on."""
    told: dict[str, Pruning] = {}
    while "model" in model.inputs:
        model = model.origin("model")
        for kept in map(model.origin, [name for name, ref in model.inputs.items() if ref.step in PRUNES]):
            told[kept.step] = kept.told(Pruning)
    lines = [
        f"- {step}: {what_stays(pruning)}." + (f" {said}." if (said := believed(pruning)) else "")
        for step, pruning in sorted(told.items())
        if pruning.sources
    ]
    return ["\n".join(["Pruning of the instruction data:", "", *lines])] if lines else []


def _quantization(model: Quantization) -> list[str]:
    lines = [f"- {scheme}: {count} linear layers" for scheme, count in model.linears.items()]
    return ["## Quantization", "\n".join([*lines, f"- {model.bytes_before} bytes before, {model.bytes_after} after"])]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
