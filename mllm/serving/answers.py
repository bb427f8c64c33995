"""Writes what clients are sent: answers, streams and transcripts in the forms of OpenAI's API.

Knows keys of JSON. Does not know requests, models or HTTP.
"""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from mllm.budget import MEDIA
from mllm.serving.service import Choice, Usage

DONE = b"data: [DONE]\n\n"


def event(values: dict[str, Any]) -> bytes:
    """Write one event of a stream."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n".encode()


def usage_of(used: Usage) -> dict[str, Any]:
    """Return the `usage` of an answer: OpenAI's counts, with the soft tokens and the budget that was served.

    `budget` is null where items of one medium were served at different ones; `media` says it of each.
    """
    soft = {m: sum(item.tokens for item in used.media if item.medium == m) for m in MEDIA}
    held = {item.medium for item in used.media}
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {f"{medium}_tokens": soft[medium] for medium in MEDIA if medium in held},
        "budget": used.budget,
        "is_trained": all(item.is_trained for item in used.media),
        "media": [
            {"type": item.medium, "tokens": item.tokens, "budget": item.budget, "is_trained": item.is_trained}
            for item in used.media
        ],
        "known_media": used.known_media,
    }


def finish_of(choice: Choice) -> dict[str, Any]:
    """Tell why an answer ended: OpenAI's reason, and what stopped it where that says more."""
    reason = "stop" if choice.ending == "stop" else "length"
    detail = choice.stop_text if choice.ending == "stop" else "repetition" if choice.ending == "repetition" else None
    return {"finish_reason": reason, "stop_reason": detail}


@dataclass(frozen=True)
class ChatAnswer:
    """Holds the answer to one chat request, whole or in pieces.

    Args:
        model: the name it is served under.
    """

    model: str
    has_token_ids: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, choices: list[Choice], used: Usage) -> dict[str, Any]:
        """Return all answers at once."""
        return self._head("chat.completion") | {
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": None,
                    **finish_of(choice),
                    **self._ids(choice),
                }
                for number, choice in enumerate(choices)
            ],
            "usage": usage_of(used),
        }

    def opening(self, number: int) -> dict[str, Any]:
        """Return the first event of an answer."""
        return self._chunk(number, {"role": "assistant", "content": ""})

    def piece(self, number: int, text: str) -> dict[str, Any]:
        """Return a piece of an answer."""
        return self._chunk(number, {"content": text})

    def closing(self, number: int, choice: Choice) -> dict[str, Any]:
        """Return the last event of an answer."""
        return self._chunk(number, {}, {**finish_of(choice), **self._ids(choice)})

    def usage(self, used: Usage) -> dict[str, Any]:
        """Return the event behind all answers."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage_of(used)}

    def _chunk(self, number: int, delta: dict[str, Any], ending: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None, **(ending or {})}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _ids(self, choice: Choice) -> dict[str, Any]:
        return {"token_ids": list(choice.ids)} if self.has_token_ids else {}


def transcript_of(choice: Choice, used: Usage, *, form: str, language: str, seconds: float) -> dict[str, Any]:
    """Return a transcript as JSON, short or with what is known of the clip."""
    short = {"text": choice.text, "usage": {"type": "tokens", **transcript_usage(used)}}
    if form == "json":
        return short
    return {"task": "transcribe", "language": language, "duration": round(seconds, 3), **short}


def transcript_usage(used: Usage) -> dict[str, Any]:
    """Return the `usage` of a transcript, whose counts OpenAI calls by other names."""
    values = usage_of(used)
    names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
    names["prompt_tokens_details"] = "input_token_details"
    return {names.get(key, key): value for key, value in values.items()}
