"""Finds out what transformers calls the key-value cache: `past_key_values` up to 5.23, `cache` from 5.24 on.

`generate`, `forward` of decoders and their layers, and model outputs share one name. The library is asked for it here,
once; everybody else says `**cache_argument(cache)` and `cache_of(outputs)`. The older name still works in 5.24 and
warns; nothing here leans on that.
"""

import inspect
from typing import Any

import transformers
from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values")
"""Every name the library has given it. Our own `forward` takes each, whatever version calls it."""


def _name_in(function: Any) -> str:
    """Finds the name under which a function of the library takes the cache.

    Raises:
        ImportError: it takes it under no name known here.
    """
    parameters = inspect.signature(function).parameters
    if name := next((name for name in CACHE_NAMES if name in parameters), None):
        return name
    raise ImportError(
        f"transformers {transformers.__version__} takes the key-value cache of {function.__qualname__} neither as "
        f"{' nor as '.join(CACHE_NAMES)}; `mllm doctor` says which versions are tested"
    )


_library: Any = GenerationMixin  # its methods are typed for whole models, which it is not by itself
CACHE_NAME = _name_in(_library.prepare_inputs_for_generation)
"""The name in the version that is installed."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """Gives a cache, or None, as the keyword argument of the library's functions and outputs."""
    return {CACHE_NAME: cache}


def cache_of(outputs: Any) -> Any:
    """Takes the cache from the outputs of a model of the library, or of ours."""
    return getattr(outputs, CACHE_NAME)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """Takes the cache of a call that may name it either way.

    Raises:
        ValueError: it was given under both names.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("got cache and past_key_values; they are one argument, give one of them")
    return past_key_values if cache is None else cache
