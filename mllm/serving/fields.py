"""Reads the keys of one object of a request; a key that nobody has read is refused.

Knows JSON types and names. Does not know what the keys mean.
"""

import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mllm.serving.errors import RequestError, bad_request
from mllm.serving.json_body import kind_of

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 80


def shown(value: object) -> str:
    """Show a value in a message, shortened."""
    return _shorten.repr(value)


class Fields:
    """Reads the keys of one object one by one.

    Args:
        values: the object.
        where: its place in the body, such as `messages[0].content[1]`; empty for the body itself.

    Raises:
        RequestError: 400, not an object.
    """

    def __init__(self, values: object, where: str = "") -> None:
        self.where = where
        if not isinstance(values, Mapping):
            raise bad_request(f"{where} must be an object, got {kind_of(values)}", where)
        self._values = values
        self._known: list[str] = []

    def path(self, key: str) -> str:
        """Return the place of a key in the body."""
        return f"{self.where}.{key}" if self.where else key

    def refused(self, key: str, message: str) -> RequestError:
        """Make the refusal of a key's value."""
        path = self.path(key)
        return bad_request(f"{path} {message}", path)

    def get(self, key: str) -> Any:
        """Read a value of any type; null is the same as a key that is missing."""
        self._known.append(key)
        return self._values.get(key)

    def text(self, key: str, *, max_chars: int | None = None) -> str | None:
        """Read a text, or None where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refused(key, f"must be a text, got {kind_of(value)}")
        if value is not None and max_chars is not None and len(value) > max_chars:
            raise self.refused(key, f"is {len(value)} characters long; at most {max_chars} are allowed")
        return value

    def choice(self, key: str, allowed: Sequence[str]) -> str | None:
        """Read one of some texts, or None where there is none."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self.refused(key, f"is {shown(value)}; allowed: {', '.join(allowed)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Read true or false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refused(key, f"must be true or false, got {kind_of(value)}")
        return default if value is None else value

    def whole(self, key: str, least: int, most: int) -> int | None:
        """Read a whole number within bounds, or None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refused(key, f"must be a whole number, got {shown(value)}")
        if not least <= value <= most:
            raise self.refused(key, f"is {shown(value)}; allowed: {least} to {most}")
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        """Read a number within bounds, or None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(key, f"must be a number, got {shown(value)}")
        if not least <= value <= most:
            raise self.refused(key, f"is {shown(value)}; allowed: {least:g} to {most:g}")
        return float(value)

    def only(self, key: str, *allowed: object) -> None:
        """Refuse every value of a key but those that ask for what is done anyway."""
        value = self.get(key)
        is_same_type = any(
            isinstance(value, bool) == isinstance(option, bool) and value == option for option in allowed
        )
        if value is not None and not is_same_type:
            names = ", ".join(str(option).lower() if isinstance(option, bool) else shown(option) for option in allowed)
            raise self.refused(key, f"is {shown(value)}; this server takes only {names}")

    def done(self) -> None:
        """Refuse what was not read.

        Raises:
            RequestError: 400, a key that nothing reads; the nearest that is known is named.
        """
        for key in self._values:
            if key not in self._known:
                near = get_close_matches(str(key), self._known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(self._known)}"
                raise self.refused(shown(key).strip("'\""), f"is not known here; {hint}")
