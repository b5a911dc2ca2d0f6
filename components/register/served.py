"""MLflow's way into a registered model: loads the quantized checkpoint with our own code, answers a table of questions.

MLflow calls `_load_pyfunc` by this module's name (`loader_module`); nothing is unpickled. This is the
reference path in torch; users are served by vLLM.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import DataError

if TYPE_CHECKING:
    import pandas

    from nvila.components.model.vision.preprocess import Kind

MEDIA: tuple[Kind, ...] = ("image", "video")
MAX_NEW_TOKENS = 32


class Answerer:
    """Answers questions; holds the model."""

    def __init__(self, folder: Path) -> None:
        from nvila.components.model.checkpoint.quantized import load_quantized

        self.model, self.tokenizer = load_quantized(folder)
        self.model.eval()

    def predict(self, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One answer per row; media keep the default `Limits`, as the model does not know its recipe's.

        Args:
            model_input: columns `question`, and `image` or `video` or both: a path, base64 text or a `data:` URL.
            params: `max_new_tokens`.

        Raises:
            DataError: a medium that cannot be decoded, or one of a kind that the question has no place for.
        """
        limit = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        return [self._answer(row, limit) for row in model_input.to_dict("records")]

    def _answer(self, row: dict[str, Any], max_new_tokens: int) -> str:
        from nvila.components.model.decode.answer import generate
        from nvila.components.model.text.conversation import Turn, arranged
        from nvila.components.model.text.prompt import make_prompt
        from nvila.components.model.vision.media import load_medium

        config = self.model.config
        media: list[tuple[Kind, Any]] = []
        with tempfile.TemporaryDirectory() as scratch:
            for kind in MEDIA:
                given = row.get(kind)
                if isinstance(given, str) and given:
                    media.append((kind, load_medium(_as_file(given, Path(scratch, kind)), kind, config)))
        turns = [Turn("human", str(row["question"]))]
        prompt = make_prompt(turns, arranged(turns, media), config)
        return generate(self.model, self.tokenizer, [prompt], max_new_tokens=max_new_tokens)[0]


def _load_pyfunc(data_path: str) -> Answerer:
    return Answerer(Path(data_path))


def _as_file(given: str, scratch: Path) -> Path:
    """Path of the medium: itself, or a scratch file with the decoded bytes."""
    if not given.startswith("data:") and len(given) < 4096 and Path(given).exists():
        return Path(given)
    text = given.partition(",")[2] if given.startswith("data:") else given
    try:
        scratch.write_bytes(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise DataError(
            "neither a file nor base64", value=given[:80], do="Give a path, base64 text or a data: URL."
        ) from None
    return scratch
