"""Reads the JSON object in a request's body, or refuses it.

Knows bytes and JSON. Does not know what the keys mean.
"""

from typing import Any

from mllm.serving.errors import bad_request
from mllm.utils import strict_json

MAX_DEPTH = 32
"""Deepest nesting of lists and objects in a body."""


def read_json(body: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Read a JSON object in UTF-8, as strictly as `mllm.utils.strict_json`, nested at most `max_depth` deep.

    Raises:
        RequestError: 400, anything else.
    """
    try:
        value = strict_json.read_json(body.decode("utf-8"), max_depth=max_depth)
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    except ValueError as error:
        raise bad_request(f"the body is {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """Name the JSON type of a value, for messages."""
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")
