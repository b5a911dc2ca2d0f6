import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.decode.answer import generate, stream
from nvila.components.model.decode.structured import JsonSchema
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.conversation import Turn
from nvila.components.model.text.prompt import Prompt, make_prompt

Picture = Callable[..., Image.Image]
SHAPE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "café"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 99},
        "seen": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["colour", "sides", "seen"],
    "additionalProperties": False,
}


@pytest.fixture
def prompt(model: NVILA, picture: Picture) -> Prompt:
    return make_prompt([Turn("human", "Which?")], [picture()], model.config)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 1}, {"temperature": 9.0, "top_p": 0.7}])
def test_answers_keep_the_schema(model: NVILA, tokenizer: Any, prompt: Prompt, options: dict[str, Any]) -> None:
    """Prevents text outside of the schema, greedy, sampled, streamed or in a batch, from weights that know no JSON."""
    schema = JsonSchema(tokenizer, SHAPE)
    answers = generate(model, tokenizer, [prompt, prompt, prompt], 100, schema=schema, **options)
    for answer in answers:
        jsonschema.validate(json.loads(answer), SHAPE)
    assert "".join(stream(model, tokenizer, prompt, 100, schema=schema, **options)) == answers[0]


def test_a_cut_answer_is_the_beginning(model: NVILA, tokenizer: Any, prompt: Prompt) -> None:
    """Prevents a limit that changes what comes before it."""
    schema = JsonSchema(tokenizer, SHAPE)
    (whole,) = generate(model, tokenizer, [prompt], 100, schema=schema)
    (cut,) = generate(model, tokenizer, [prompt], 8, schema=schema)
    assert whole.startswith(cut) and len(cut) < len(whole)


@given(st.lists(st.integers(-9, 9), max_size=4), st.sampled_from(["", "naïve 東京", '"\\\n']))
@settings(max_examples=20, deadline=None)
def test_every_conforming_text_is_allowed(tokenizer: Any, numbers: list[int], text: str) -> None:
    """Prevents masks that forbid what the schema asks for, also where a character is several tokens."""
    schema = JsonSchema(tokenizer, {"type": "array", "items": {"type": ["integer", "string"]}})
    allowed = schema.begin(1)
    written = json.dumps([*numbers, text], ensure_ascii=False)
    vocabulary = len(tokenizer) - 3
    for token in [*tokenizer(written, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
        assert torch.isfinite(allowed.mask(torch.zeros(1, vocabulary))[0, token])
        allowed.accept(torch.tensor([token]))
    left = torch.isfinite(allowed.mask(torch.zeros(1, vocabulary))[0]).nonzero().flatten().tolist()
    assert left == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"not": {"type": "string"}},
        {"type": "array", "uniqueItems": True},
        {"$ref": "https://example.org/schema.json"},
        {"enum": []},
        ["no", "object"],
        {"$ref": "#"},
        {"type": "array", "minItems": 10**9},
    ],
)
def test_what_cannot_be_kept_is_refused(tokenizer: Any, schema: Any) -> None:
    """Prevents a keyword that is ignored without a word, a schema that fetches another document, an empty answer to one
    that has no end, and all memory for one that counts too far."""
    with pytest.raises(ConfigError, match="JSON schema"):
        JsonSchema(tokenizer, schema)


def test_answers_may_speak_of_control_strings(model: NVILA, tokenizer: Any, prompt: Prompt) -> None:
    """Prevents a schema that names one from stopping the answer at its beginning."""
    named = {"enum": ["<image>", "<|im_end|>"]}
    (answer,) = generate(model, tokenizer, [prompt], 60, schema=JsonSchema(tokenizer, named))
    assert json.loads(answer) in named["enum"]


def test_files_that_are_no_schema(tokenizer: Any, tmp_path: Path) -> None:
    """Prevents a traceback on a wrong path, and endless reading of a large or deeply nested file."""
    path = tmp_path / "schema.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b" " * (2**20 + 1)):
        path.write_bytes(content)
        with pytest.raises(ConfigError):
            JsonSchema.read(tokenizer, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        JsonSchema.read(tokenizer, tmp_path / "none.json")
    path.write_text(json.dumps(SHAPE))
    assert JsonSchema.read(tokenizer, path).begin(1)
