"""Bodies are read strictly: what is not understood is refused, with the key as it was written and what is allowed."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
import tiny

from mllm.serving.budgets import BudgetPolicy
from mllm.serving.chat_request import ChatReader
from mllm.serving.errors import RequestError
from mllm.serving.json_body import MAX_DEPTH, read_json
from mllm.serving.limits import Batching, RequestLimits
from mllm.serving.sources import SourceRules

PIXEL = "data:image/png;base64," + base64.b64encode(b"not looked at here").decode()
LIMITS = RequestLimits(max_media=3, max_choices=4, max_new_tokens=50)
READER = ChatReader("toy", LIMITS, SourceRules(), BudgetPolicy(tiny.processor(tiny.settings()).space))


def body(**changes: Any) -> dict[str, Any]:
    """A good body with some keys changed; None takes a key out."""
    whole = {"model": "toy", "messages": [{"role": "user", "content": "what?"}], **changes}
    return {key: value for key, value in whole.items() if value is not None}


def of(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


def shown(url: Any, **beside: Any) -> dict[str, Any]:
    """Messages with one image."""
    return {"messages": of({"type": "image_url", "image_url": url, **beside})}


def heard(audio: Any) -> dict[str, Any]:
    """Messages with one audio clip."""
    return {"messages": of({"type": "input_audio", "input_audio": audio})}


FIRST = "messages[0].content[0]"
IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}
SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"model": None}, "model", "model is missing; allowed: toy"),
        ({"model": 3}, "model", "model must be a text, got a number"),
        ({"messages": None}, "messages", "must be a list of messages, got null"),
        ({"messages": []}, "messages", "must be a list of messages"),
        ({"messages": "hi"}, "messages", "must be a list of messages, got a text"),
        ({"messages": ["hi"]}, "messages[0]", r"messages\[0\] must be an object, got a text"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "is missing; allowed: system, user, assistant"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "is 'tool'; allowed: system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text or a list of parts, got null"),
        ({"messages": of()}, "messages[0].content", "must be a text or a list of parts, got a list"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name", "is not known here"),
        ({"messages": SAID}, "messages", "the last message must be the user's"),
        ({"messages": of("a")}, FIRST, "must be an object, got a text"),
        ({"messages": of({"text": "a"})}, f"{FIRST}.type", "is missing; allowed: text, input_audio"),
        ({"messages": of({"type": "file"})}, f"{FIRST}.type", "is 'file'; allowed: text"),
        ({"messages": of({"type": "text"})}, f"{FIRST}.text", "is missing"),
        ({"messages": of({"type": "text", "text": 4})}, f"{FIRST}.text", "must be a text"),
        ({"messages": of({"type": "text", "text": "a", "budget": "image=4"})}, f"{FIRST}.budget", "is not known"),
        ({"messages": of({"type": "image_url"})}, f"{FIRST}.image_url", "must be an object, got null"),
        ({"messages": of({"type": "image_url", "image_url": {}})}, f"{FIRST}.image_url.url", "is missing"),
        (shown({"url": PIXEL, "details": "low"}), f"{FIRST}.image_url.details", "did you mean detail"),
        (shown({"url": PIXEL, "budget": "image=4"}, budget="image=4"), f"{FIRST}.image_url.budget", "is given twice"),
        (shown("data:image/png,abc"), f"{FIRST}.image_url.url", "a data URL is written data:TYPE;base64"),
        (shown("data:image/png;base64,ab c"), f"{FIRST}.image_url.url", "is not base64"),
        (shown("data:image/png;base64,abcde"), f"{FIRST}.image_url.url", "is not base64"),
        (shown("data:image/png;base64,"), f"{FIRST}.image_url.url", "holds no bytes"),
        (shown("data:text/html;base64,YQ=="), f"{FIRST}.image_url.url", "the type 'text/html'; allowed: image/..."),
        (heard({"format": "wav"}), f"{FIRST}.input_audio.data", "is missing"),
        (heard({"data": "é", "format": "wav"}), f"{FIRST}.input_audio.data", "is not base64"),
        (heard({"data": "YQ==", "format": "exe"}), f"{FIRST}.input_audio.format", "is 'exe'; allowed: wav, mp3"),
        ({"messages": of(*[IMAGE] * 4)}, "messages", "there are 4 media; at most 3 are allowed"),
        ({"max_tokens": 0}, "max_tokens", "is 0; allowed: 1 to 50"),
        ({"max_tokens": 51}, "max_tokens", "is 51; allowed: 1 to 50"),
        ({"max_tokens": 5.0}, "max_tokens", "must be a whole number, got 5.0"),
        ({"max_tokens": True}, "max_tokens", "must be a whole number, got True"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "and max_completion_tokens differ"),
        ({"temperature": -0.1}, "temperature", "is -0.1; allowed: 0 to 2"),
        ({"temperature": "hot"}, "temperature", "must be a number, got 'hot'"),
        ({"seed": 2**70}, "seed", "allowed: 0 to"),
        ({"n": 5}, "n", "is 5; allowed: 1 to 4"),
        ({"n": 10**9}, "n", "is 1000000000; allowed: 1 to 4"),
        ({"stream": 1}, "stream", "must be true or false, got a number"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream true"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk", "is not known here"),
        ({"stop": ["a"] * 5}, "stop", "must be at most 4 texts"),
        ({"stop": [""]}, "stop", "must be at most 4 texts of 1 to 64 characters"),
        ({"stop": {"a": 1}}, "stop", "must be at most 4 texts"),
        ({"top_p": 0.9}, "top_p", "is 0.9; this server takes only 1"),
        ({"frequency_penalty": 1}, "frequency_penalty", "takes only 0"),
        ({"logprobs": True}, "logprobs", "takes only false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "takes only {'type': 'text'}"),
        ({"tools": []}, "tools", "tools is not known here"),
        ({"max_new_token": 3}, "max_new_token", "did you mean max_"),
        ({"user": "x" * 300}, "user", "is 300 characters long; at most 256"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(changes: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        READER.read(body(**changes))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_another_model_is_not_found() -> None:
    with pytest.raises(RequestError, match="model 'gpt' is not served here; allowed: toy") as caught:
        READER.read(body(model="gpt"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_what_asks_for_what_is_done_anyway_is_taken() -> None:
    same = {"top_p": 1.0, "frequency_penalty": 0, "logprobs": False, "user": "me", "response_format": {"type": "text"}}
    read = READER.read(body(**same, temperature=0, seed=4, stop="x", max_tokens=7, n=2))
    assert (read.rules.temperature, read.rules.seed, read.rules.stop) == (None, 4, ("x",))
    assert (read.rules.max_new_tokens, read.num_choices, read.is_stream, read.has_usage) == (7, 2, False, True)
    assert READER.read(body(stream=True)).has_usage is False
    assert READER.read(body()).rules.max_new_tokens == 50


def test_texts_and_media_stay_in_their_order() -> None:
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"s").decode(), "format": "wav"}}
    messages = [{"role": "developer", "content": "be short"}, *of({"type": "text", "text": "a"}, IMAGE, audio)]
    (role, parts), (_, said) = READER.read(body(messages=messages)).conversation.turns
    assert (role, parts) == ("system", ("be short",))
    assert said[0] == "a"
    assert [(medium.medium, medium.content, medium.turn, medium.where) for medium in said[1:]] == [  # type: ignore[union-attr]
        ("image", b"not looked at here", 1, "messages[1].content[1]"),
        ("audio", b"s", 1, "messages[1].content[2]"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is not JSON: Expecting value at column 1"),
        (b"{\n {", "the body is not JSON: Expecting property name enclosed in double quotes at line 2, column 2"),
        (b'{"a": NaN}', "the body is not JSON: NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number with too many digits"),
        (b"[]", "must be a JSON object, got a list"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice in one object"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 32 levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested deeper than 32 levels"),
    ],
)
def test_json_is_read_strictly(content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read_json(content)
    assert caught.value.status == 400


def test_the_deepest_body_that_is_read() -> None:
    nested: Any = 1
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    assert read_json(json.dumps({"a": nested}).encode())["a"] == nested
    with pytest.raises(RequestError, match="nested deeper"):
        read_json(json.dumps({"a": [nested]}).encode())


def test_limits_are_numbers_above_zero() -> None:
    with pytest.raises(ValueError, match=r"requests\.max_requests must be above 0, got 0"):
        RequestLimits(max_requests=0)
    with pytest.raises(ValueError, match=r"batching\.max_rows must be above 0, got -1"):
        Batching(max_rows=-1)
    assert replace(LIMITS, repetition_tokens=0).repetition_tokens == 0
