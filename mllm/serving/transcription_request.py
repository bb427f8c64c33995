"""Reads the form of `POST /v1/audio/transcriptions` as a conversation about one clip, or refuses it.

Knows the fields of OpenAI's API. Does not know models or HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mllm.inference.request import DEFAULT_PROMPTS
from mllm.media import MediaError
from mllm.serving.answering import AnswerRules
from mllm.serving.budgets import BudgetPolicy, Wishes, read_body_wishes
from mllm.serving.decoders import PooledLoader
from mllm.serving.errors import bad_request, refusal_of
from mllm.serving.fields import Fields
from mllm.serving.limits import RequestLimits
from mllm.serving.preparation import Conversation, PromptMedium
from mllm.serving.request_options import read_model, read_rules
from mllm.serving.sources import SourceRules

FORMATS = ("json", "text", "verbose_json")
_NUMBERS = {"temperature": float, "seed": int, "max_tokens": int}
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class TranscriptionRequest:
    """Says what is to be transcribed, and in which form the transcript is wanted."""

    conversation: Conversation
    rules: AnswerRules
    form: str
    language: str
    is_stream: bool


@dataclass(frozen=True)
class TranscriptionReader:
    """Reads the forms of transcription requests for one model.

    Args:
        model: the name it is served under.
        media: those it takes as streams: audio, and video where it reads lips.
        prompts: what it is asked about media, by media.
        languages: those it transcribes, the usual one first.
    """

    model: str
    limits: RequestLimits
    sources: SourceRules
    policy: BudgetPolicy
    media: Sequence[str]
    prompts: Mapping[tuple[str, ...], str]
    languages: Sequence[str]

    def read(self, form: Mapping[str, object], content: bytes, loader: PooledLoader) -> TranscriptionRequest:
        """Read a form whose file holds `content`; the file's header is looked at, so this may take a while.

        Args:
            form: all fields but the file.

        Raises:
            RequestError: 400, a field that is not known, a value that is not allowed, or a file without anything that
                this model transcribes; 404, another model.
        """
        fields = Fields(_read_types(form))
        read_model(fields, self.model)
        rules = read_rules(fields, self.limits, max_tokens_keys=("max_tokens",))
        kind = fields.choice("response_format", FORMATS) or FORMATS[0]
        language = fields.choice("language", tuple(self.languages)) or self.languages[0]
        is_stream = fields.flag("stream")
        wishes = read_body_wishes(fields)
        fields.done()
        if is_stream and kind != "json":
            raise fields.refused("response_format", f"is {kind} with stream true; allowed: json")
        self.sources.check_size(content, "video" if "video" in self.media else "audio", "file")
        media = [PromptMedium(medium, content, 0, "file") for medium in self._media_of(content, loader)]
        names = tuple(medium.medium for medium in media)
        text = {**DEFAULT_PROMPTS, **self.prompts}[names]
        budget = self.policy.resolve([(name, Wishes("file")) for name in names], wishes)
        conversation = Conversation((("user", (*media, text)),), budget)
        return TranscriptionRequest(conversation, replace(rules, needs_text=is_stream), kind, language, is_stream)

    def _media_of(self, content: bytes, loader: PooledLoader) -> list[str]:
        """List what of the file is read: its audio, and its frames where the model reads lips."""
        if not self.media:
            raise bad_request("this model transcribes neither audio nor video", "model")
        try:
            streams = loader.probe(content)
        except MediaError as error:
            raise refusal_of(error, "file") from error
        media = [medium for medium in ("audio", "video") if streams[medium] and medium in self.media]
        if not media:
            raise bad_request(
                f"the file holds no stream that is transcribed here; allowed: {' and '.join(self.media)} in a known "
                "format",
                "file",
            )
        return media


def _read_types(form: Mapping[str, object]) -> dict[str, object]:
    """Read the fields of a form, which come as texts; what is no number or flag stays one, to be refused later."""
    values: dict[str, object] = {}
    for key, value in form.items():
        read: object = value
        if key in _NUMBERS and isinstance(value, str) and value.isascii():
            try:
                read = _NUMBERS[key](value)
            except ValueError:
                read = value
        elif key == "stream" and isinstance(value, str):
            read = _FLAGS.get(value.lower(), value)
        values[key] = read
    return values
