"""Encodes a conversation to token ids and labels, with one placeholder id where each medium stands.

Knows a tokenizer, a chat template and the ids around a medium. Does not know files, encoders or budgets.

Only the template may make special ids. What people wrote is tokenised apart from it, with special tokens read as plain
text (see `mllm.processing.plain_text`), so that a user who types `<image>` or an end-of-turn marker has typed just
that. Text is cut where the template stops and people begin to write, never elsewhere, and a piece that goes on after
text is read as
going on: SentencePiece vocabularies put a space before every text that they take for a new one.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mllm.data.manifest import Media, Message, Part, Text
from mllm.data.numbered_images import number_images
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.plain_text import PlainText, special_tokens
from mllm.utils.time_bound import at_most

MAX_TEMPLATE_SECONDS = 10.0
"""How long a chat template may render a conversation, which takes milliseconds; a loop in a loop may never end."""

# `plain` is what the synthetic LLM has read; `vicuna_v1` is the conversation form of LLaVA-1.5 (its
# conversation.py, "v1"); `llava_plain` is that of its first stage: the question is not read, only the image, its
# caption and a line break, which is learned in place of an end of turn; `avsr` is how Llama-AVSR, Llama-MTSK and
# Omni-AVSR put audio, video, prompt and transcript side by side, without a space between them. `chat` stands for the
# template that came with the tokenizer.
TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    ),
    "avsr": (
        "{{ bos_token }}{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "llava_plain": (
        "{{ bos_token }}{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
    "vicuna_v1": (
        "{{ bos_token }}{% if messages[0].role != 'system' %}A chat between a curious user and an artificial "
        "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "{% endif %}{% for message in messages %}"
        "{% if message.role == 'user' %}USER: {{ message.content }} "
        "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
        "{% else %}{{ message.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    ),
}
FORMATS = (*TEMPLATES, "chat")
# Private-use characters mark where each part of the content lies in the rendered template.
_MARK = re.compile("\ue000(\\d+)\ue001")

MAX_LAYOUTS = 4096
"""Layouts that are kept; conversations of the same speakers and media have the same."""


def mark(number: int) -> str:
    """Return what stands in a rendered template for a part of the conversation."""
    return f"\ue000{number}\ue001"


class RefusedConversation(ValueError):
    """Says that the chat format has no place for a conversation: the fault of one sample, unless it is that of all."""


def template_ends() -> AbstractContextManager[None]:
    """End a chat template of jinja that is rendered inside the block and takes too long; see `at_most`.

    Raises:
        TooSlowError: a ValueError.
    """
    return at_most(MAX_TEMPLATE_SECONDS, "<template>", "the chat template")


@dataclass(frozen=True)
class Prompt:
    """Holds the ids of a conversation with one placeholder per medium, labels, and the media in order of appearance."""

    ids: list[int]
    labels: list[int]
    media: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Holds a stretch that is the same in every conversation of a layout; the first ids of it may be learned."""

    ids: tuple[int, ...]
    num_targets: int = 0


@dataclass(frozen=True, slots=True)
class _Slot:
    """Says where people write: the space before it, whether it goes on after text, and whether it is learned."""

    glue: str
    continues: bool
    is_target: bool


Layout = tuple[_Fixed | _Slot, ...]


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    A prompt ends without the space that its template ends with, which an answer's first word brings along;
    `keeps_last_space` is for hosts, whose own pipelines keep it, and `brings_template` for their own templates.

    Args:
        tokenizer: a fast tokenizer.
        chat_format: `plain`, `llava_plain`, `avsr`, `vicuna_v1`, or `chat` for the tokenizer's own template.
        placeholder_ids: per medium the id that stands for it.
        span_ids: per medium the ids before and after it.
        names_images: number the images of a conversation in the text; see `number_images`.

    Raises:
        ValueError: an unknown format, or `chat` with a tokenizer that has no template.
    """

    keeps_last_space = False
    brings_template = False

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_format: str,
        placeholder_ids: Mapping[str, int],
        span_ids: Mapping[str, Sequence[Sequence[int]]] | None = None,
        names_images: bool = False,
    ) -> None:
        if chat_format not in FORMATS:
            raise ValueError(f"chat_format is {chat_format!r}; allowed: {', '.join(FORMATS)}")
        if chat_format == "chat" and not (self.brings_template or tokenizer.chat_template):
            raise ValueError("chat_format is 'chat', but the tokenizer has no chat template; use plain or vicuna_v1")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one is needed")
        self.names_images = names_images
        self.tokenizer = tokenizer
        self.going_on = without_prefix(tokenizer)
        self._plain = PlainText(tokenizer, self.going_on, reserved_ids=set(placeholder_ids.values()))
        self.chat_format = chat_format
        self.template = TEMPLATES.get(chat_format)
        self.placeholder_ids = dict(placeholder_ids)
        self.span_ids = {medium: (list(before), list(after)) for medium, (before, after) in (span_ids or {}).items()}
        special = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
        self._layouts: dict[Any, Layout] = {}
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Prompt:
        """Encode a conversation; what assistants said, with the end of their turn, is the target.

        Raises:
            ValueError: a medium without a placeholder id, a conversation that the format has no place for, or a
                template that drops or repeats a message.
        """
        return self.encode_all([messages], add_generation_prompt=add_generation_prompt)[0]

    def encode_all(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
    ) -> list[Prompt]:
        """Encode many conversations at once, which is several times as fast as one by one.

        Raises:
            ValueError: see `__call__`; it does not say which conversation.
        """
        return self._prompts(conversations, [self._plan(messages, add_generation_prompt) for messages in conversations])

    def unfinished(self, messages: Sequence[Message]) -> Prompt:
        """Encode a conversation whose last message goes on: it ends with the last of its words.

        Raises:
            ValueError: see `__call__`; or the last message does not end with words.
        """
        if not messages or not messages[-1].parts or not isinstance(messages[-1].parts[-1], Text):
            raise ValueError("the last message must end with a text that can be gone on with")
        layout, written = self._plan(messages, False)
        end = max(index for index, piece in enumerate(layout) if isinstance(piece, _Slot)) + 1
        return self._prompts([messages], [(layout[:end], written)])[0]

    def _prompts(
        self, conversations: Sequence[Sequence[Message]], plans: Sequence[tuple[Layout, list[str]]]
    ) -> list[Prompt]:
        read = self._tokenized(plans)
        prompts = []
        for messages, (layout, _) in zip(conversations, plans, strict=True):  # `read` goes on through all of them
            ids: list[int] = []
            labels: list[int] = []
            for piece in layout:
                if isinstance(piece, _Fixed):
                    new, num = piece.ids, piece.num_targets
                else:
                    new = next(read)
                    num = len(new) if piece.is_target else 0
                ids += new
                labels += [*new[:num], *[IGNORED_LABEL] * (len(new) - num)]
            media = tuple(part.medium for message in messages for part in message.parts if isinstance(part, Media))
            prompts.append(Prompt(ids, labels, media))
        return prompts

    def count_all(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, int]]:
        """Count, per conversation, its ids, placeholders included, and those that are learned.

        Raises:
            ValueError: see `__call__`; it does not say which conversation.
        """
        plans = [self._plan(messages, False) for messages in conversations]
        read = self._tokenized(plans)
        counts = []
        for layout, _ in plans:
            num_ids = num_targets = 0
            for piece in layout:
                is_fixed = isinstance(piece, _Fixed)
                length = len(piece.ids) if is_fixed else len(next(read))
                num_targets += piece.num_targets if is_fixed else length * piece.is_target
                num_ids += length
            counts.append((num_ids, num_targets))
        return counts

    def _plan(self, messages: Sequence[Message], prompt: bool) -> tuple[Layout, list[str]]:
        """Return how a conversation is laid out, and what stands in the slots."""
        messages = self._read(number_images(messages) if self.names_images else messages)
        speakers = tuple(
            (message.role, tuple(part.medium if isinstance(part, Media) else "" for part in message.parts))
            for message in messages
        )
        layout = self._layouts.get((speakers, prompt))
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[speakers, prompt] = tuple(self._layout(messages, prompt))
        return layout, [part.text for message in messages for part in message.parts if isinstance(part, Text)]

    def _read(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages that the format has a place for: all, or in `llava_plain` the media of a question and its
        answer.
        """
        if self.chat_format != "llava_plain":
            return messages
        roles = [message.role for message in messages]
        media = [part for part in messages[0].parts if isinstance(part, Media)] if messages else []
        if roles not in (["user"], ["user", "assistant"]) or not media:
            raise RefusedConversation(
                f"chat_format llava_plain is for one question with an image and its answer, got {', '.join(roles)} "
                f"with {len(media)} media; use vicuna_v1"
            )
        return [Message("user", tuple(media)), *messages[1:]]

    def _tokenized(self, plans: Sequence[tuple[Layout, list[str]]]) -> Iterator[list[int]]:
        """Tokenize what people wrote, slot by slot; with one call of the tokenizer for each way of reading."""
        slots = [[piece for piece in layout if isinstance(piece, _Slot)] for layout, _ in plans]
        texts = [
            (slot.glue + text, slot.continues)
            for turn_slots, (_, written) in zip(slots, plans, strict=True)
            for slot, text in zip(turn_slots, written, strict=True)
        ]
        # Two streams, read in the order of the slots: each slot takes the next text of its own way of reading.
        read = {
            continues: iter(self._plain([text for text, goes_on in texts if goes_on == continues], continues=continues))
            for continues in (False, True)
        }
        return (next(read[continues]) for _, continues in texts)

    def _encode_template(self, text: str, *, continues: bool) -> tuple[int, ...]:
        """Tokenize what the template wrote, whose special tokens are meant."""
        backend = (self.going_on if continues else self.tokenizer).backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return tuple(backend.encode(text, add_special_tokens=False).ids)

    def _layout(self, messages: Sequence[Message], prompt: bool) -> Iterator[_Fixed | _Slot]:
        """Yield template text and what people write by turns.

        A space before a written part is handed to the part: tokenizers join it to the word after it, so
        "ASSISTANT: red" must be cut before the space, not after.
        """
        parts = self._cut_at(messages)
        rendered = self._rendered(messages, len(parts), prompt)
        if beginning := self._take_beginning(rendered):
            yield _Fixed(beginning)
        continues = answering = False
        for position, text in enumerate(rendered):
            follower = parts[position][1] if position < len(parts) else None
            # Before a medium the space stays with the template: no word follows that it could be joined to.
            takes_space = isinstance(follower, Text) or (follower is None and not self.keeps_last_space)
            glue = " " if text.endswith(" ") and takes_space else ""
            text = text.removesuffix(glue)
            yield from self._template_pieces(text, continues=continues, ends_answer=answering)
            answering = answering and not text
            continues = continues or bool(text)
            if follower is None:
                break
            answering = parts[position][0] == "assistant"
            if isinstance(follower, Text):
                yield _Slot(glue, continues, answering)
                continues = True
            else:
                yield _Fixed(self.media_ids(follower.medium))
                continues = False

    def _cut_at(self, messages: Sequence[Message]) -> list[tuple[str, Part]]:
        """List the parts, with who speaks, at which the rendered template is cut."""
        return [(message.role, part) for message in messages for part in message.parts]

    def _take_beginning(self, rendered: list[str]) -> tuple[int, ...]:
        """Take the ids that a prompt begins with, and behind which text begins anew, out of the template's text."""
        bos = self.tokenizer.bos_token
        if self.template is None or not bos or not rendered[0].startswith(bos):
            return ()
        rendered[0] = rendered[0].removeprefix(bos)
        return (self.tokenizer.bos_token_id,)

    def _marked(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages as the template takes them, with a numbered mark in place of each part."""
        marks = itertools.count()
        return [
            {"role": message.role, "content": "".join(mark(next(marks)) for _ in message.parts)} for message in messages
        ]

    def _rendered(self, messages: Sequence[Message], num_parts: int, prompt: bool) -> list[str]:
        """Return the template's text before, between and after the parts of a conversation."""
        rendered = self._applied(self._marked(messages), prompt)
        split = _MARK.split(rendered)
        if [int(number) for number in split[1::2]] != list(range(num_parts)):
            raise RefusedConversation("the tokenizer's chat template drops, repeats or reorders what people wrote")
        return split[::2]

    def _applied(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        """Return what the template makes of messages.

        A template is a program of other people's: it refuses by an error of jinja, and where it has not thought of a
        conversation it fails as any program does, or never ends.
        """
        from jinja2 import TemplateError

        try:
            with template_ends():
                return self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
                )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RefusedConversation(f"the chat template refuses the turns {roles}: {error}") from error

    def _template_pieces(self, text: str, *, continues: bool, ends_answer: bool) -> Iterator[_Fixed]:
        """Yield template text, cut before its first special token, which tokenizers part from what stands before it.

        After an answer that special token ends the turn and is learned, with what stands before it; without one
        nothing is, but the line break of `llava_plain`.
        """
        first = self._special.search(text)
        cut = len(text) if first is None else first.start()
        learns = ends_answer and (first is not None or self.chat_format == "llava_plain")
        if before := text[:cut]:
            ids = self._encode_template(before, continues=continues)
            yield _Fixed(ids, len(ids) if learns else 0)
        if after := text[cut:]:
            ids = self._encode_template(after, continues=False)
            yield _Fixed(ids, int(learns))

    def media_ids(self, medium: str) -> tuple[int, ...]:
        """Return the ids that stand for a medium: its placeholder, and the marks around it.

        Raises:
            ValueError: a medium without a placeholder.
        """
        if medium not in self.placeholder_ids:
            allowed = ", ".join(self.placeholder_ids) or "text only"
            raise ValueError(f"this model does not take {medium}; it takes {allowed}")
        before, after = self.span_ids.get(medium, ([], []))
        return (*before, self.placeholder_ids[medium], *after)


def without_prefix(tokenizer: Any) -> Any:
    """Return the tokenizer for text that goes on: without the space that SentencePiece vocabularies put before a new
    text.

    A tokenizer that puts none, or that is byte-level, is given back as it is.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    changed = [
        step
        for key in ("normalizer", "pre_tokenizer")
        for step in _steps(state.get(key))
        if (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never") or step["type"] == "Prepend"
    ]
    if not changed:
        return tokenizer
    for step in changed:
        step.update({"prepend_scheme": "never"} if step["type"] == "Metaspace" else {"prepend": ""})
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    return other


def _steps(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normaliser or pre-tokeniser, which may be a sequence of them."""
    if state is None:
        return []
    return state.get("normalizers") or state.get("pretokenizers") or [state]
