"""Reads what every kind of request says alike: which model, how the answer is chosen and when it ends.

Knows keys and limits. Does not know messages, files or models.
"""

import secrets

from mllm.serving.answering import AnswerRules
from mllm.serving.errors import RequestError
from mllm.serving.fields import Fields, shown
from mllm.serving.limits import RequestLimits

MAX_SEED = 2**63 - 1
MAX_STOPS, MAX_STOP_CHARS = 4, 64


def read_model(fields: Fields, served: str) -> None:
    """Refuse a request for another model.

    Raises:
        RequestError: 400 without a model, 404 with another one.
    """
    name = fields.text("model")
    if name is None:
        raise fields.refused("model", f"is missing; allowed: {served}")
    if name != served:
        raise RequestError(
            404, f"model {shown(name)} is not served here; allowed: {served}", param="model", code="model_not_found"
        )


def read_rules(fields: Fields, limits: RequestLimits, *, max_tokens_keys: tuple[str, ...]) -> AnswerRules:
    """Read how an answer is chosen and when it ends.

    Raises:
        RequestError: 400, values that are not allowed, or one limit under two names.
    """
    counts = {key: fields.whole(key, 1, limits.max_new_tokens) for key in max_tokens_keys}
    stated = {key: count for key, count in counts.items() if count is not None}
    if len(set(stated.values())) > 1:
        raise fields.refused(max_tokens_keys[0], f"and {max_tokens_keys[1]} differ; give one of them")
    temperature = fields.number("temperature", 0.0, 2.0)
    seed = fields.whole("seed", 0, MAX_SEED)
    return AnswerRules(
        max_new_tokens=next(iter(stated.values()), limits.max_new_tokens),
        temperature=temperature or None,
        seed=secrets.randbits(63) if seed is None else seed,
        repetition_tokens=limits.repetition_tokens,
    )


def read_stops(fields: Fields) -> tuple[str, ...]:
    """Read the texts that end an answer: one, or a list of at most four.

    Raises:
        RequestError: 400, anything else.
    """
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    is_list = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if not is_list or len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise fields.refused(
            "stop", f"must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters, got {shown(value)}"
        )
    return tuple(stops)
