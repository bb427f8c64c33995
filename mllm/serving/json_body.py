"""Reads the JSON object in a request's body, or refuses it.

Knows bytes and JSON. Does not know what the keys mean.
"""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from mllm.serving.errors import RequestError, bad_request

MAX_DEPTH = 32
"""Deepest nesting of lists and objects in a body."""


def read_json(body: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Read a JSON object.

    Stricter than Python's own reader: UTF-8 alone, no NaN or Infinity, no number too large to be one, no key twice, no
    half of a surrogate pair, and no nesting deeper than `max_depth`.

    Raises:
        RequestError: 400, anything else.
    """
    try:
        text = body.decode("utf-8")
        read = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # a whole number of more digits than Python reads
        raise bad_request("the body holds a number with too many digits") from None
    if not isinstance(read, dict):
        raise bad_request(f"the body must be a JSON object, got {kind_of(read)}")
    for value, depth in _values(read):
        if depth > max_depth:
            raise _too_deep(max_depth)
        if isinstance(value, str) and not value.isascii():
            _check_text(value)
    return read


def kind_of(value: object) -> str:
    """Name the JSON type of a value, for messages."""
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def _values(read: Any) -> Iterator[tuple[Any, int]]:
    """Yield everything in a JSON value, keys included, with how deep it lies; not by recursion, which has an end."""
    waiting = [(read, 1)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, dict):
            waiting += [(inner, depth + isinstance(inner, dict | list)) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            waiting += [(inner, depth + isinstance(inner, dict | list)) for inner in value]


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("the body holds half of a surrogate pair, which is no character") from None


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"the body holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise bad_request(f"the body holds the number {text[:32]}, which is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise bad_request(f"the body holds the key {twice[:64]!r} twice in one object")
    return read


def _too_deep(max_depth: int) -> RequestError:
    return bad_request(f"the body is nested deeper than {max_depth} levels")
