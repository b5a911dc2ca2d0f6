"""Which parameters of a request are answered, and in which bounds: one model of fields per path.

What is not named here is refused with the nearest name; `REFUSED` says why for what clients know from elsewhere, and
`DROPPED` names what changes no answer here. `requests` puts the fields together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.serve.facts import Facts

MOST_LOGPROBS = 20
"""Of a token; vLLM's own limit."""
MOST_WORDS = 64
"""Stop texts and bad words: each is looked for after every token."""
MOST_IDS = 1024
"""Of a list of token ids."""


@dataclass(frozen=True)
class Bounds:
    """What a request is judged by."""

    facts: Facts
    settings: EndpointSettings


def _bounds(info: ValidationInfo) -> Bounds:
    assert isinstance(info.context, Bounds)
    return info.context


def _token(value: int, info: ValidationInfo) -> int:
    vocabulary = _bounds(info).facts.vocabulary
    if not 0 <= value < vocabulary:
        raise ValueError(f"is not a token id of this model, which go from 0 to {vocabulary - 1}")
    return value


def _prompt_token(value: int, info: ValidationInfo) -> int:
    if _token(value, info) in _bounds(info).facts.markers:
        raise ValueError("stands for a picture or a clip; send those to /v1/chat/completions")
    return value


def _biased(value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
    for key in value:
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise ValueError("has token ids as keys, written as whole numbers")
        _token(int(key), info)
    return value


def _answers(value: int, info: ValidationInfo) -> int:
    if value > (most := _bounds(info).settings.max_answers):
        raise ValueError(f"is at most {most} on this server")
    return value


def _in_context(value: int, info: ValidationInfo) -> int:
    if value > (most := _bounds(info).facts.context):
        raise ValueError(f"is at most {most}, the model's longest prompt with its answer")
    return value


TokenId = Annotated[int, AfterValidator(_token)]
PromptToken = Annotated[int, AfterValidator(_prompt_token)]
Word = Annotated[str, Field(min_length=1, max_length=1000)]
Words = Annotated[list[Word], Field(max_length=MOST_WORDS)]
Length = Annotated[int, Field(ge=1), AfterValidator(_in_context)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


class Fields(BaseModel):
    """JSON types as they are written: no text is a number, and none is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Fields):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = Field(default=None, exclude=True)


class RepetitionDetection(Fields):
    """`repetition_detection`."""

    max_pattern_size: Annotated[int, Field(ge=0, le=256)] = 0
    min_pattern_size: Annotated[int, Field(ge=0, le=256)] = 0
    min_count: Annotated[int, Field(ge=0, le=10_000)] = 0


class StructuredOutputs(Fields):
    """`structured_outputs`: one of them."""

    json_: dict[str, Any] | Word | None = Field(default=None, alias="json")
    regex: Annotated[str, Field(max_length=10_000)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_IDS)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    json_object: Literal[True] | None = None


class JsonSchemaFormat(Fields):
    """`response_format.json_schema`."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Sampling(Fields):
    """What every path has."""

    model: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None


class Completion(Sampling):
    """What `/v1/chat/completions` and `/v1/completions` have in common."""

    n: Annotated[int, Field(ge=1), AfterValidator(_answers)] | None = None
    stream_options: StreamOptions | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Word | Words | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_IDS)] | None = None
    bad_words: Words | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_IDS), AfterValidator(_biased)
        ]
        | None
    ) = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=MOST_LOGPROBS)] | None = None
    prompt_logprobs: Logprobs | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Literal[-1] | Length | None = None
    truncation_side: Literal["left", "right"] | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    repetition_detection: RepetitionDetection | None = None
    stream_interval: Annotated[int, Field(ge=1, le=10_000)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]+$")] | None = None


class Chat(Completion):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Any], Field(min_length=1, max_length=10_000)]
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_prompt_text: bool | None = None
    media_io_kwargs: dict[str, Any] | None = None


class Text(Completion):
    """`POST /v1/completions`."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[PromptToken], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | Annotated[list[Annotated[list[PromptToken], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0), AfterValidator(_in_context)] | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None


class JsonOutput(Fields):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    """`output_config`."""

    format: JsonOutput | None = None


class Count(Fields):
    """`POST /v1/messages/count_tokens`, in Anthropic's protocol."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    messages: Annotated[list[Any], Field(min_length=1, max_length=10_000)]
    system: str | list[Any] | None = None
    output_config: OutputConfig | None = None


class Messages(Count, Sampling):
    """`POST /v1/messages`, in Anthropic's protocol."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    max_tokens: Length
    stop_sequences: Words | None = None


MEANT = {
    "prompt": "is a text, a list of texts, token ids, or a list of such lists, none of them empty",
    "stop": f"is a text or a list of up to {MOST_WORDS} texts, none of them empty",
}
"""Of fields with alternatives."""
NEUTRAL: tuple[Any, ...] = (None, "", [], {}, False)
"""Values that ask for nothing, of any field that is not known."""
DROPPED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"),
        *("prompt_cache_retention", "parallel_tool_calls", "request_id", "session_id", "cache_control"),
    }
)
"""Fields that change no answer here: names of users, books of the sender, hints for speed."""
_TOOLS = "the model was not trained to call tools, and its prompt has no place for them; describe them in a message"
_THINKS = "the model does not reason before it answers"
_INNER = "it is for servers that work together, and not for requests from outside"
_TEMPLATE = "the prompt is written as the model was trained; send messages, or token ids to /v1/completions"
REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "tools": (_TOOLS, ()),
    "tool_choice": (_TOOLS, ("none", "auto", {"type": "none"}, {"type": "auto"})),
    "functions": (_TOOLS, ()),
    "function_call": (_TOOLS, ("none", "auto")),
    "audio": ("the model neither hears nor speaks", ()),
    "modalities": ("answers are text", (["text"],)),
    "web_search_options": ("nothing is looked up for answers", ()),
    "verbosity": ("say in the prompt how long the answer shall be, or set max_tokens", ("medium",)),
    "reasoning_effort": (_THINKS, ("none",)),
    "reasoning": (_THINKS, ()),
    "thinking": (_THINKS, ({"type": "disabled"},)),
    "thinking_token_budget": (_THINKS, (-1,)),
    "include_reasoning": (_THINKS, (True,)),
    "use_beam_search": ("each token of a beam search is a request of its own; ask for n answers", ()),
    "best_of": ("ask for n answers, with logprobs, and choose", (1,)),
    "length_penalty": ("it belongs to beam search, which is not offered", (1, 1.0)),
    "suffix": ("the model writes only behind a text", ()),
    "prompt_embeds": ("embeddings come from texts and media here, never from outside", ()),
    "chat_template": (_TEMPLATE, ()),
    "chat_template_kwargs": ("the prompt's template has no options", ()),
    "documents": ("the prompt's template has no place for them; put them into a message", ()),
    "mm_processor_kwargs": ("media are processed as the model was trained", ()),
    "kv_transfer_params": (_INNER, ()),
    "ec_transfer_params": (_INNER, ()),
    "vllm_xargs": (_INNER, ()),
    "priority": ("requests are answered in the order in which they come", (0,)),
    "watermarking": ("answers carry no watermark", ()),
    "routed_experts_prompt_start": ("the model has no experts", (0,)),
    "return_token_offsets": ("offsets are not offered; ask for return_token_ids", ()),
    "mm_payload": ("media are not sent back", ("tensors",)),
    "return_mm_kwargs": ("media are not sent back", ()),
    "context_management": ("the whole conversation is read, as it was sent", ()),
    "mcp_servers": (_TOOLS, ()),
    "container": ("nothing is run for answers", ()),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern"),
        ("it is called structured_outputs or response_format", ()),
    ),
}
"""Why a field is refused, and values with which it asks for nothing beside `NEUTRAL`."""
