"""Times of a clip in answers of the endpoint: seconds, whole and streamed, in both protocols."""

from __future__ import annotations

import asyncio
import json

import pytest

from nvila.components.model.text.timetokens import Times, times_of
from nvila.components.serve.times import Told

TIMES = Times(2.0, 5)


def test_a_whole_answer_says_seconds() -> None:
    """A client has no use for `<t3>`: it does not know how many there are."""
    chat = {"choices": [{"index": 0, "message": {"content": "at <t3>"}}, {"index": 1, "message": {"content": None}}]}
    assert json.loads(Told(TIMES).whole(json.dumps(chat).encode()))["choices"][0]["message"]["content"] == "at <1.5>"
    other = {"content": [{"type": "text", "text": "<t4>"}]}
    assert json.loads(Told(TIMES).whole(json.dumps(other).encode()))["content"][0]["text"] == "<2.0>"


@pytest.mark.parametrize("pieces", [["at ", "<t3>", " or <", "t1> <t"], ["at <", "t", "3", "> or <t1", "> <t"]])
def test_a_streamed_answer_says_seconds(pieces: list[str]) -> None:
    """A token that comes in two events would be shown as it is, or a text that only begins like one be lost."""
    told, said = Told(TIMES), ""
    last = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    for chunk in [*chunks, last]:
        event = told.events(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        said += json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"]["content"]
    assert said == "at <1.5> or <0.5> <t"
    assert told.events(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    told, said = Told(TIMES), ""
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": p}} for p in pieces]
    for event in [*deltas, {"type": "content_block_stop", "index": 0}]:
        out = told.events(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        for part in out.split(b"\n\n")[:-1]:
            said += json.loads(part.partition(b"data: ")[2]).get("delta", {}).get("text", "")
    assert said == "at <1.5> or <0.5> <t"


def test_an_answer_tells_times_of_the_clip_that_was_read() -> None:
    """The length of a clip is known when it is decoded, behind the middleware; another clip's would be another time."""
    from nvila.components.serve.answers import Answer, Message

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    clips: list[float | None] = []

    async def answered() -> None:
        answer = Answer(send, "/v1/chat/completions")
        answer.times = lambda: times_of(5, clips)
        clips.append(2.0)
        body = json.dumps({"choices": [{"index": 0, "message": {"content": "<t3>"}}]}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await answer({"type": "http.response.start", "status": 200, "headers": headers})
        for piece, more in ((body[:9], True), (body[9:], False)):
            await answer({"type": "http.response.body", "body": piece, "more_body": more})

    asyncio.run(answered())
    body = sent[1]["body"]
    assert json.loads(body)["choices"][0]["message"]["content"] == "<1.5>"
    assert dict(sent[0]["headers"])[b"content-length"] == b"%d" % len(body) and len(sent) == 2
