"""Judges the body of one request and writes it anew: vLLM gets known fields within their bounds, and no other.

Pure: bytes in, bytes or a `Refusal` out. `guard` reads the bytes and knows about HTTP; `parameters`, `parts` and
`structured` have the rules of fields, messages and grammars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from nvila.components.contracts.foreign import parse
from nvila.components.data.sampling import Sampling
from nvila.components.model.text.controls import break_up
from nvila.components.serve import parameters
from nvila.components.serve.media import asked_sampling
from nvila.components.serve.parameters import Bounds
from nvila.components.serve.parts import Found, anthropic_messages, chat_messages, system_text
from nvila.components.serve.refusal import Refusal, nearest, shown
from nvila.components.serve.structured import judged_schema, structured_outputs

DEFAULT_MAX_TOKENS = 16
"""Of `/v1/completions`, as OpenAI has it."""

QUICK_BYTES = 4096
"""Most of a body that is judged in the event loop."""
GRAMMARS = (b"structured_outputs", b"response_format", b"output_config")
"""Fields whose judgement may take long."""


@dataclass(frozen=True)
class Judged:
    """A request that is answered."""

    body: bytes
    """What vLLM is given."""
    sampling: Sampling | None = None
    """Frames that it asks for of its clips; None is the model's own number."""


def judge(path: str, body: bytes, bounds: Bounds) -> Judged:
    """What becomes of a request.

    Args:
        path: one of `JUDGES`.
        body: as the client sent it.
        bounds: of the model and the endpoint.

    Raises:
        Refusal: it is not answered, and why.
    """
    fields, judge_fields = JUDGES[path]
    asked = _known(_object(body), fields, bounds)
    content = judge_fields(asked, bounds)
    try:
        sampling = asked_sampling(content.pop("media_io_kwargs", None), bounds.facts.sampling)
    except ValueError as error:
        raise Refusal(str(error), "media_io_kwargs") from None
    try:
        return Judged(to_json(content), sampling)
    except PydanticSerializationError:
        raise Refusal("a text has half a character in it (a lone surrogate)", code="invalid_text") from None


def is_quick(body: bytes) -> bool:
    """Whether judging it takes no time to speak of: small, and without a grammar, however the name of that is spelt."""
    return len(body) <= QUICK_BYTES and not any(word in body for word in (b"\\", *GRAMMARS))


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = parse(body.decode())
    except UnicodeDecodeError as error:
        raise Refusal(f"the body is not in UTF-8: {error.reason}", code="invalid_json") from None
    except RecursionError:
        raise Refusal("the body is not JSON that is read here: too many levels", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(f"the body is not JSON that is read here: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise Refusal(f"the body is a JSON object, not {shown(content)}", code="invalid_json")
    return content


def _known(given: dict[str, Any], fields: type[BaseModel], bounds: Bounds) -> Any:
    """The fields, each within its bounds."""
    kept = {}
    for name, value in given.items():
        if name in fields.model_fields:
            kept[name] = value
        elif name in parameters.REFUSED:
            why, neutral = parameters.REFUSED[name]
            if not any(value == one and type(value) is type(one) for one in (*parameters.NEUTRAL, *neutral)):
                raise Refusal(f"{name} is not offered: {why}", name, code="unsupported_parameter")
        elif name not in parameters.DROPPED and value is not None:
            near = nearest(name, fields.model_fields)
            raise Refusal(f"{name[:100]!r} is not a parameter here{near}", name[:100], code="unknown_parameter")
    try:
        return fields.model_validate(kept, context=bounds)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)) from None


def _refusal(errors: Sequence[ErrorDetails]) -> Refusal:
    """The error that got furthest into the body: of the alternatives of a field, the one that was meant."""
    error = max(reversed(errors), key=_depth)
    place = _place(error["loc"])
    at = ".".join(map(str, place))
    if error["type"] == "missing":
        return Refusal(f"{at} is missing", at, code="missing_parameter")
    if error["type"] == "extra_forbidden":
        return Refusal(f"{at} is not known", at, code="unknown_parameter")
    why = error["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(" after validation")[0]
    if error["type"].endswith(("_type", "_short")):
        why = parameters.MEANT.get(str(place[0]), why)
    return Refusal(f"{at}: {why[:1].lower()}{why[1:]}, not {shown(error['input'])}", at)


def _depth(error: ErrorDetails) -> tuple[int, bool]:
    return sum(isinstance(step, int) for step in error["loc"]), not error["type"].endswith("_type")


def _place(steps: Sequence[int | str]) -> list[int | str]:
    """Without the names of alternatives that pydantic puts between."""
    return [step for step in steps if isinstance(step, int) or (step.isidentifier() and step not in _KINDS)]


_KINDS = {"str", "int", "float", "bool", "list", "dict"}


def _chat(asked: parameters.Chat, bounds: Bounds) -> dict[str, Any]:
    found = Found()
    content = _completion(asked, bounds) | {"messages": chat_messages(asked.messages, found)}
    _require_room(found, bounds)
    if found.media and asked.truncate_prompt_tokens is not None:
        raise Refusal(
            "truncate_prompt_tokens would cut pictures and clips apart; send fewer or smaller ones",
            "truncate_prompt_tokens",
        )
    if asked.continue_final_message:
        if content["messages"][-1]["role"] != "assistant":
            raise Refusal(
                "continue_final_message goes on with an answer: the last message has role assistant",
                "continue_final_message",
            )
        if asked.add_generation_prompt:
            raise Refusal(
                "add_generation_prompt begins a new answer, continue_final_message goes on with one; choose",
                "add_generation_prompt",
            )
        content["add_generation_prompt"] = False
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal("top_logprobs asks for more of logprobs: set logprobs to true", "top_logprobs")
    _require_logprobs(asked, bool(asked.logprobs))
    content.pop("max_completion_tokens", None)
    most = asked.max_completion_tokens or asked.max_tokens
    content["max_tokens"] = _max_tokens(most, asked.n or 1, bounds)
    return content


def _text(asked: parameters.Text, bounds: Bounds) -> dict[str, Any]:
    content = _completion(asked, bounds)
    one = isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int)
    prompts: Any = [asked.prompt] if one else asked.prompt
    texts = [break_up(p, bounds.facts.controls) if isinstance(p, str) else p for p in prompts]
    content["prompt"] = texts[0] if one else texts
    for text in texts:
        _require_room(Found(characters=len(text) if isinstance(text, str) else 0), bounds)
    most = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    if most == 0 and not asked.echo:
        raise Refusal("max_tokens is at least 1, or 0 with echo", "max_tokens")
    _require_logprobs(asked, asked.logprobs is not None)
    content["max_tokens"] = most and _max_tokens(most, _answers(len(prompts), asked.n or 1, bounds), bounds)
    return content


def _completion(asked: parameters.Completion, bounds: Bounds) -> dict[str, Any]:
    """What chat and text have in common; messages, prompt and lengths are left to them."""
    if asked.stream_options is not None and not asked.stream:
        raise Refusal("stream_options needs stream: true", "stream_options")
    if asked.prompt_logprobs and asked.stream:
        raise Refusal("prompt_logprobs come with whole answers only: set stream to false", "prompt_logprobs")
    if (asked.n or 1) > 1 and asked.temperature == 0:
        raise Refusal("n answers at temperature 0 are all the same; set a temperature, or n to 1", "n")
    found = asked.repetition_detection
    if found and (found.min_pattern_size > found.max_pattern_size or (found.max_pattern_size and found.min_count < 2)):
        raise Refusal(
            "repetition_detection has min_pattern_size up to max_pattern_size, and a min_count of at least 2",
            "repetition_detection",
        )
    content = asked.model_dump(
        exclude_none=True, exclude={"messages", "prompt", "structured_outputs", "response_format"}
    )
    if asked.bad_words:
        content["bad_words"] = [break_up(word, bounds.facts.controls) for word in asked.bad_words]
    if held := structured_outputs(asked.structured_outputs, asked.response_format, bounds.facts):
        content["structured_outputs"] = held
    return content


def _messages(asked: parameters.Messages, bounds: Bounds) -> dict[str, Any]:
    content = _count(asked, bounds)
    content["max_tokens"] = _max_tokens(asked.max_tokens, 1, bounds)
    return content


def _count(asked: parameters.Count, bounds: Bounds) -> dict[str, Any]:
    found = Found()
    content = asked.model_dump(exclude_none=True, exclude={"messages", "system", "output_config"})
    if asked.system is not None:
        content["system"] = system_text(asked.system, found)
    content["messages"] = anthropic_messages(asked.messages, found)
    _require_room(found, bounds)
    if asked.output_config is not None and asked.output_config.format is not None:
        at = "output_config.format.schema"
        schema = judged_schema(asked.output_config.format.schema_, at, bounds.facts)
        content["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return content


def _require_room(found: Found, bounds: Bounds) -> None:
    settings, facts = bounds.settings, bounds.facts
    if found.media > settings.max_media:
        raise Refusal(
            f"{found.media} pictures, clips and single frames; at most {settings.max_media} on this server",
            "messages",
            code="too_many_media",
        )
    if found.characters > (most := facts.context * facts.longest):
        raise Refusal(
            f"{found.characters} characters; the model's {facts.context} tokens hold at most {most}",
            code="context_length_exceeded",
        )


def _require_logprobs(asked: parameters.Completion, has_them: bool) -> None:
    if asked.logprob_token_ids and not has_them:
        raise Refusal("logprob_token_ids says which logprobs: ask for logprobs too", "logprob_token_ids")


def _answers(prompts: int, n: int, bounds: Bounds) -> int:
    most = bounds.settings.max_answers
    if prompts * n > most:
        raise Refusal(f"{prompts} prompts with {n} answers each; at most {most} answers on this server", "n")
    return prompts * n


def _max_tokens(asked: int | None, answers: int, bounds: Bounds) -> int:
    """Of one answer; where nothing is asked, what the endpoint and the model allow."""
    most, context = bounds.settings.max_tokens, bounds.facts.context
    if asked is None:
        return max(1, min(context, most // answers))
    if asked * answers > most:
        raise Refusal(f"{answers} answers of up to {asked} tokens; at most {most} tokens on this server", "max_tokens")
    return asked


Judge = Callable[[Any, Bounds], dict[str, Any]]
JUDGES: dict[str, tuple[type[BaseModel], Judge]] = {
    "/v1/chat/completions": (parameters.Chat, _chat),
    "/v1/completions": (parameters.Text, _text),
    "/v1/messages": (parameters.Messages, _messages),
    "/v1/messages/count_tokens": (parameters.Count, _count),
}
"""Paths with a body, the fields that it may have, and how it is judged."""
