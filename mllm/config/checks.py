"""Checks numbers of configs, and names the value that a part on disk decides."""

from collections.abc import Iterable
from typing import Literal

from mllm.config.reading import ConfigError

Auto = Literal["auto"]


def check_at_least(config: object, keys: Iterable[str], least: float = 1, *, prefix: str = "") -> None:
    """Refuse numbers of a dataclass that are too small; None and words are none.

    Args:
        prefix: where the dataclass stands in its config, such as "data.", where no reader says it.

    Raises:
        ValueError: the first of the keys whose value is.
    """
    for key in keys:
        value = getattr(config, key)
        if value is not None and not isinstance(value, str) and value < least:
            if prefix:  # the dataclass knows where it stands, and no reader says it again
                raise ValueError(f"{prefix}{key} is {value}; it must be at least {least}")
            raise ConfigError(key, f"is {value}; it must be at least {least}")
