"""The pinned prompts as a version brings them along, for who serves it where neither store nor data are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.modelrollout import MOST_PINNED, MOST_PINNED_BYTES, PINNED_FILE
from nvila.components.contracts.results.accuracy import QuantizedEvaluation
from nvila.components.metrics.pinned import choose
from nvila.components.serve.server import chat_request


def write_pinned(folder: Path, name: str, inputs: Mapping[str, Manifest]) -> Path:
    """Write the file of a model's prompts: the same bytes for the same model, evaluation and data.

    Args:
        folder: gets it.
        name: what requests call the model.
        inputs: `metrics` (of evaluate-quantized) and `samples`.
    """
    folder.mkdir(exist_ok=True)
    with (folder / PINNED_FILE).open("wb") as stream:
        left = MOST_PINNED_BYTES
        for line in _lines(name, inputs):
            if len(line) <= left:  # a long clip makes way for what fits
                stream.write(line)
                left -= len(line)
    return folder / PINNED_FILE


def _lines(name: str, inputs: Mapping[str, Manifest]) -> Iterator[bytes]:
    longest = inputs["metrics"].told(QuantizedEvaluation).max_new_tokens
    for prompt in choose(inputs["metrics"], inputs["samples"], MOST_PINNED):
        body = chat_request(name, prompt.question, max_tokens=longest) | {"logprobs": True}
        told = {"id": prompt.id, "body": body, "expected": prompt.expected, "answer": prompt.answer}
        yield json.dumps(told, ensure_ascii=False).encode() + b"\n"
