"""The chat template as data: Qwen2's, which NVILA speaks, with whatever default system prompt a model was trained with.

`jinja` writes it down for others, and reads it out of a checkpoint's own Jinja.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nvila.components.contracts.errors import ConfigError

SYSTEM = "You are a helpful assistant"
"""Default of the Qwen2 template, without Qwen2.5's full stop."""


@dataclass(frozen=True)
class Template:
    """The texts around the turns of a conversation."""

    system: str | None
    """Default system prompt; the empty one is the no-system variant, and None has no such turn unless one is given."""
    system_open: str
    system_close: str
    user_open: str
    user_close: str
    answer_open: str
    """What a model is asked to go on from."""
    answer_end: str
    """Supervised: teaches the model to stop."""
    answer_close: str
    """Not supervised."""

    def segments(
        self, bodies: Sequence[tuple[str, str]], *, system: str | None = None, generate: bool = False
    ) -> Iterator[tuple[str, bool]]:
        """Consecutive texts of a conversation with whether they are supervised.

        Args:
            bodies: role ("user" or "assistant") and text of each turn.
            system: system prompt; None takes the default.
            generate: end with the opening of an answer.
        """
        prompt = self.system if system is None else system
        text = "" if prompt is None else f"{self.system_open}{prompt}{self.system_close}"
        for role, body in bodies:
            if role == "assistant":
                yield text + self.answer_open, False
                yield body + self.answer_end, True
                text = self.answer_close
            else:
                text += f"{self.user_open}{body}{self.user_close}"
        yield text + (self.answer_open if generate else ""), False


QWEN2 = Template(
    system=SYSTEM,
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>\n",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
    answer_open="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    answer_close="\n",
)


def template_of(tokenizer: Any) -> Template:
    """What a tokenizer's chat template says; Qwen2's for a tokenizer without one.

    Raises:
        ConfigError: a template that is not Qwen2's, with whatever default system prompt.
    """
    written = getattr(tokenizer, "chat_template", None)
    if isinstance(written, dict):  # several by name
        written = written.get("default")
    if written is None:
        return QWEN2
    if not isinstance(written, str):
        raise ConfigError("a chat template is a text", where="chat_template", value=written)
    from nvila.components.model.text.jinja import read_template

    return read_template(written, tokenizer.bos_token, tokenizer.eos_token)


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end of sequence, and what its template puts behind an answer.

    With Qwen2's template and an instruct tokenizer that is `<|im_end|>` alone.
    """
    end = tokenizer(template_of(tokenizer).answer_end, add_special_tokens=False)["input_ids"][0]
    eos = tokenizer.eos_token_id
    return frozenset([end] if eos is None else [end, eos])
