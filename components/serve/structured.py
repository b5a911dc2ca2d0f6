"""Answers that have to be JSON of a schema, or of a grammar: judged before vLLM sees them, by the rules of `infer`.

vLLM would give half an answer, or none, for a grammar that the library gives up on in the middle of it, and fill the
answer with white space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from nvila.components.contracts.foreign import parse
from nvila.components.model.decode.structured import prepared, require_keepable, schema_grammar
from nvila.components.model.text.controls import break_up
from nvila.components.serve.refusal import Refusal

if TYPE_CHECKING:
    from nvila.components.serve.facts import Facts
    from nvila.components.serve.parameters import ResponseFormat, StructuredOutputs

ANY_OBJECT = {"type": "object"}


def structured_outputs(
    given: StructuredOutputs | None, response_format: ResponseFormat | None, facts: Facts
) -> dict[str, Any] | None:
    """What vLLM is asked to hold answers to; None for nothing.

    Raises:
        Refusal: two are asked for, or one that cannot be kept, with the reason.
    """
    schema: Any = None
    at = "structured_outputs"
    asked = {} if given is None else given.model_dump(exclude_none=True, by_alias=True)
    if response_format is not None and response_format.type != "text":
        if asked:
            raise Refusal("response_format and structured_outputs ask for two forms of one answer; send one", at)
        at = "response_format"
        schema = ANY_OBJECT
        if response_format.type == "json_schema":
            if response_format.json_schema is None:
                raise Refusal("response_format.json_schema has the schema, and is missing", f"{at}.json_schema")
            schema = response_format.json_schema.schema_
            at = "response_format.json_schema.schema"
    elif given is None:
        return None
    elif len(asked) != 1:
        raise Refusal("structured_outputs has one of json, regex, choice, grammar and json_object", at)
    elif "json" in asked or "json_object" in asked:
        at = f"{at}.{next(iter(asked))}"
        schema = asked.get("json", ANY_OBJECT)
    if schema is not None:
        return {"json": judged_schema(schema, at, facts)}
    (name, value), *_ = asked.items()
    broken = [break_up(one, facts.controls) for one in value] if name == "choice" else break_up(value, facts.controls)
    return {name: _judged(name, broken, f"{at}.{name}", facts)}


def judged_schema(schema: Any, at: str, facts: Facts) -> dict[str, Any]:
    """The schema as vLLM is given it.

    Raises:
        Refusal: answers cannot be held to it.
    """
    try:
        ready = prepared(parse(schema) if isinstance(schema, str) else schema, facts.controls)
        require_keepable(schema_grammar(ready), facts.tokens(), facts.vocabulary)
    except (ValueError, RecursionError) as error:
        raise _refusal("JSON schema", error, at) from None
    return ready


def _judged(name: str, value: Any, at: str, facts: Facts) -> Any:
    from llguidance import grammar_from

    try:
        require_keepable(
            grammar_from(cast("Literal['regex', 'choice', 'grammar']", name), value), facts.tokens(), facts.vocabulary
        )
    except (ValueError, RecursionError) as error:
        raise _refusal(name, error, at) from None
    return value


def _refusal(what: str, error: Exception, at: str) -> Refusal:
    said = " ".join(str(error).split())[:400] or "it cannot be read"
    return Refusal(f"{at}: answers cannot be held to this {what}: {said}", at, code="unsupported_grammar")
