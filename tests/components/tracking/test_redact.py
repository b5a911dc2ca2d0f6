from __future__ import annotations

from typing import Any

import pytest

from nvila.components.tracking.flatten import metrics, parameters
from nvila.components.tracking.redact import HIDDEN, redact, redact_text


@pytest.mark.parametrize("key", ["token", "hf_token", "apiKey", "api_key", "API-KEY", "apikey", "password", "db.passwd",
                                 "client_secret", "aws_secret_access_key", "private_key", "credentials"])  # fmt: skip
def test_secret_keys_are_hidden(key: str) -> None:
    """Each is a name under which somebody keeps a secret."""
    assert redact({"a": {key: "hunter2"}}) == {"a": {key: HIDDEN}}


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_new_tokens", 8), ("max_length_tokens", 8192), ("tokenizer", "qwen"), ("key", "value"), ("secretary", "Jo"),
     ("token", None), ("monkey", 1), ("keep_ratio", 0.5)],
)  # fmt: skip
def test_ordinary_settings_stay_readable(key: str, value: Any) -> None:
    """Hiding `max_length_tokens` would make runs impossible to compare."""
    assert redact({key: value}) == {key: value}


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("postgresql+psycopg2://me:hunter2@host:5432/db", "@host:5432/db", "hunter2"),
        ("https://ghp_hunter2@host/x", "@host/x", "hunter2"),
        ("https://me:p@ss-hunter2@host/x", "host/x", "hunter2"),
        ("https://host/x?X-Amz-Signature=hunter2&part=3", "part=3", "hunter2"),
        ("Authorization: Bearer hunter2hunter2", "Authorization", "hunter2"),
        ("login failed: password=hunter2, host=db", "host=db", "hunter2"),
        ('{"api_key": "hunter2", "n": 1}', '"n": 1', "hunter2"),
    ],
)
def test_secrets_inside_text_are_hidden(text: str, kept: str, gone: str) -> None:
    """Error messages quote URLs and headers."""
    assert gone not in redact_text(text)
    assert kept in redact_text(text)


@pytest.mark.parametrize("text", ["hf://Qwen/Qwen2-1.5B@8faed761d45a", "hf://gpt2@main", "s3://bucket/key",
                                  "a@b.example", "max_length_tokens: 8192", "accuracy 0.31 is below 0.4"])  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    """A revision is not a password."""
    assert redact_text(text) == text


def test_parameters_are_flat_and_of_legal_names() -> None:
    """MLflow refuses other characters and would drop the whole batch."""
    assert parameters({"a": [1, 2], "b": [{"c": "x"}, {"c": None}], "d?": True}) == {
        "a": "[1, 2]",
        "b.0.c": "x",
        "b.1.c": "null",
        "d_": "true",
    }


def test_metrics_are_numbers_only() -> None:
    """A flag logged as 1.0 would be drawn as a curve."""
    assert metrics({"a": {"b": 1, "c": True, "d": "x", "e": [1, 2]}, "f": 0.5}) == {"a/b": 1.0, "f": 0.5}
