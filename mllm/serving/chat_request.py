"""Reads the body of `POST /v1/chat/completions` as a conversation with budgets, or refuses it.

Knows the keys of OpenAI's API, those of vLLM's beside them, and ours. Does not know models or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm.data.manifest import ROLES
from mllm.serving.answering import AnswerRules
from mllm.serving.budgets import BudgetPolicy, Wishes, read_body_wishes, read_part_wishes
from mllm.serving.errors import bad_request
from mllm.serving.fields import Fields
from mllm.serving.json_body import kind_of
from mllm.serving.limits import RequestLimits
from mllm.serving.preparation import Conversation, PromptMedium
from mllm.serving.request_options import read_model, read_rules, read_stops
from mllm.serving.sources import SourceRules, read_base64

ROLE_NAMES = {**{role: role for role in ROLES}, "developer": "system"}
"""What roles are called by clients, and by the package."""
URL_TYPES = {f"{medium}_url": medium for medium in ("image", "audio", "video")}
PART_TYPES = ("text", "input_audio", *URL_TYPES)
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "aac", "m4a", "aiff", "webm", "mp4")
MAX_MESSAGES = 1024
MAX_USER_CHARS = 256


@dataclass(frozen=True)
class ChatRequest:
    """Holds a conversation and how it is to be answered."""

    conversation: Conversation
    rules: AnswerRules
    num_choices: int = 1
    is_stream: bool = False
    has_usage: bool = True
    has_token_ids: bool = False


@dataclass(frozen=True)
class ChatReader:
    """Reads the bodies of chat requests for one model.

    Args:
        model: the name it is served under.
        sources: which media may be read.
    """

    model: str
    limits: RequestLimits
    sources: SourceRules
    policy: BudgetPolicy

    def read(self, body: Any) -> ChatRequest:
        """Read a body; media that it only names are fetched here, so this may take a while.

        Raises:
            RequestError: 400, a key that is not known, a value that is not allowed, a medium that cannot be had or a
                budget that cannot be met; 404, another model.
        """
        fields = Fields(body)
        read_model(fields, self.model)
        rules = replace(
            read_rules(fields, self.limits, max_tokens_keys=("max_tokens", "max_completion_tokens")),
            stop=read_stops(fields),
        )
        num_choices = fields.whole("n", 1, self.limits.max_choices) or 1
        is_stream = fields.flag("stream")
        has_usage = self._read_usage(fields, is_stream)
        has_token_ids = fields.flag("return_token_ids")
        ignores_end = fields.flag("ignore_eos")
        wishes = read_body_wishes(fields)
        messages = fields.get("messages")
        fields.text("user", max_chars=MAX_USER_CHARS)  # a label, which changes nothing
        _refuse_what_is_not_done(fields)
        fields.done()
        turns, beside = self._turns(messages)
        media = [part for _, parts in turns for part in parts if isinstance(part, PromptMedium)]
        budget = self.policy.resolve(list(zip([medium.medium for medium in media], beside, strict=True)), wishes)
        rules = replace(rules, needs_text=is_stream, ignores_end=ignores_end)
        return ChatRequest(Conversation(turns, budget), rules, num_choices, is_stream, has_usage, has_token_ids)

    @staticmethod
    def _read_usage(fields: Fields, is_stream: bool) -> bool:
        """Tell whether the answer has its usage, which streams have on request."""
        options = fields.get("stream_options")
        if options is None:
            return not is_stream
        if not is_stream:
            raise fields.refused("stream_options", "goes with stream true")
        stream_fields = Fields(options, "stream_options")
        has_usage = stream_fields.flag("include_usage")
        stream_fields.done()
        return has_usage

    def _turns(self, messages: Any) -> tuple[tuple[tuple[str, tuple[str | PromptMedium, ...]], ...], list[Wishes]]:
        """Return the turns of a conversation, and what stands beside its media of budgets."""
        if not isinstance(messages, list) or not messages:
            raise bad_request(f"messages must be a list of messages, got {kind_of(messages)}", "messages")
        if len(messages) > MAX_MESSAGES:
            raise bad_request(f"there are {len(messages)} messages; at most {MAX_MESSAGES} are allowed", "messages")
        self._check_number(messages)
        turns, beside = [], []
        for number, message in enumerate(messages):
            fields = Fields(message, f"messages[{number}]")
            role = fields.choice("role", tuple(ROLE_NAMES))
            if role is None:
                raise fields.refused("role", f"is missing; allowed: {', '.join(ROLE_NAMES)}")
            content = fields.get("content")
            fields.done()
            parts = [content] if isinstance(content, str) else self._parts(content, number, fields, beside)
            turns.append((ROLE_NAMES[role], tuple(parts)))
        if turns[-1][0] != "user":
            raise bad_request(f"the last message must be the user's, got one of the role {turns[-1][0]}", "messages")
        return tuple(turns), beside

    def _check_number(self, messages: Sequence[Any]) -> None:
        """Refuse too many media before any of them is decoded."""
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        number = sum(isinstance(part, dict) and part.get("type") in PART_TYPES[1:] for part in parts)
        if number > self.limits.max_media:
            raise bad_request(f"there are {number} media; at most {self.limits.max_media} are allowed", "messages")

    def _parts(self, content: Any, number: int, message: Fields, beside: list[Wishes]) -> list[str | PromptMedium]:
        if not isinstance(content, list) or not content:
            raise message.refused("content", f"must be a text or a list of parts, got {kind_of(content)}")
        parts: list[str | PromptMedium] = []
        for index, part in enumerate(content):
            fields = Fields(part, f"{message.where}.content[{index}]")
            kind = fields.choice("type", PART_TYPES)
            if kind is None:
                raise fields.refused("type", f"is missing; allowed: {', '.join(PART_TYPES)}")
            if kind == "text":
                text = fields.text("text")
                if text is None:
                    raise fields.refused("text", "is missing")
                parts.append(text)
            else:
                medium, wishes = self._medium(kind, fields, number)
                parts.append(medium)
                beside.append(wishes)
            fields.done()
        return parts

    def _medium(self, kind: str, fields: Fields, turn: int) -> tuple[PromptMedium, Wishes]:
        medium = URL_TYPES.get(kind, "audio")
        value = fields.get(kind)
        if isinstance(value, str) and kind in URL_TYPES:
            value = {"url": value}
        source = Fields(value, fields.path(kind))
        wishes = read_part_wishes(medium, [fields, source])
        if kind == "input_audio":
            source.choice("format", AUDIO_FORMATS)  # what it is shows by its first bytes
            data = source.text("data")
            if data is None:
                raise source.refused("data", "is missing; give the audio as base64")
            content = read_base64(data, source.path("data"))
            self.sources.check_size(content, medium, source.path("data"))
        else:
            url = source.text("url")
            if url is None:
                raise source.refused("url", "is missing; give a data URL")
            content = self.sources.read(url, medium, source.path("url"))
        source.done()
        return PromptMedium(medium, content, turn, fields.where), wishes


def _refuse_what_is_not_done(fields: Fields) -> None:
    """Take those values of OpenAI's other options that ask for what is done anyway, and refuse the rest."""
    fields.only("top_p", 1)
    for key in ("frequency_penalty", "presence_penalty"):
        fields.only(key, 0)
    for key in ("logprobs", "store", "parallel_tool_calls"):
        fields.only(key, False)
    fields.only("response_format", {"type": "text"})
    fields.only("modalities", ["text"])
    fields.only("service_tier", "auto", "default")
