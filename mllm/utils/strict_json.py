"""Reads JSON strictly, and says what is wrong with it in words that follow "the body is" or "line 3 is".

Does not know where a text comes from or what its keys mean.
"""

import json
from collections.abc import Iterator
from typing import Any, NoReturn


def read_json(text: str, *, max_depth: int | None = None) -> Any:
    """Read a JSON value.

    Stricter than Python's own reader: no NaN or Infinity, no number too large to be one, no key twice in one object,
    no half of a surrogate pair.

    Args:
        text: decoded from UTF-8, so that escapes are the only way to write half of a surrogate pair in it.
        max_depth: deepest nesting of lists and objects; as deep as Python reads where there is none.

    Raises:
        ValueError: anything else; the message begins with "not" or "nested".
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(_too_deep(max_depth)) from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    # Most texts have neither a limit nor such escapes, and are not gone through a second time.
    if max_depth is not None or "\\u" in text:
        _check_values(value, max_depth)
    return value


def _check_values(whole: Any, max_depth: int | None) -> None:
    for value, depth in _values(whole):
        if max_depth is not None and depth > max_depth:
            raise ValueError(_too_deep(max_depth))
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError("not Unicode text: it holds half of a surrogate pair") from error


def _values(whole: Any) -> Iterator[tuple[Any, int]]:
    """Yield everything in a JSON value, keys included, with how deep it lies; not by recursion, which has an end."""
    waiting = [(whole, 1)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, dict):
            waiting += [(inner, depth + isinstance(inner, dict | list)) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            waiting += [(inner, depth + isinstance(inner, dict | list)) for inner in value]


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:64]!r} stands twice in one object")
    return read


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:32]} is too large")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python reads no more than some thousands of digits
        raise ValueError("it holds a number with too many digits") from None


def _too_deep(max_depth: int | None) -> str:
    return "not JSON: nested too deeply" if max_depth is None else f"nested deeper than {max_depth} levels"


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_of, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
)
