"""From a conversation to token ids and labels, with one placeholder id where each medium stands.

Knows a tokenizer, a chat template and the ids around a medium. Does not know files, encoders or budgets.

Only the template may make special ids. What people wrote is tokenised apart from it, with special tokens read as plain
text, so that a user who types `<image>` or an end-of-turn marker has typed just that. Text is cut where the template
stops and people begin to write, never elsewhere, and a piece that goes on after text is read as going on: SentencePiece
vocabularies put a space before every text that they take for a new one.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mllm.data.manifest import Media, Message, Text
from mllm.splice import IGNORED_LABEL

# `plain` is what the built-in world's LLM has read; `vicuna_v1` is the conversation form of LLaVA-1.5 (its
# conversation.py, "v1"); `llava_plain` is that of its first stage: the question is not read, only the picture, its
# caption and a line break, which is learned in place of an end of turn; `avsr` is how Llama-AVSR, Llama-MTSK and
# Omni-AVSR put sound, lips, prompt and transcript side by side, without a space between them. `chat` stands for the
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
_NOTHING, _ALL = 0, -1


@dataclass(frozen=True)
class Prompt:
    """Ids of a conversation with one placeholder per medium, labels, and the media in order of appearance."""

    ids: list[int]
    labels: list[int]
    media: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of a conversation.

    Args:
        text: to be tokenised, where there are no `ids`.
        ids: what it becomes.
        is_written: by people, so that special tokens in it are plain text.
        continues: goes on after text.
        num_targets: how many of its ids are learned, counted from the first; all where it is -1.
    """

    text: str = ""
    ids: tuple[int, ...] | None = None
    is_written: bool = False
    continues: bool = False
    num_targets: int = _NOTHING


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        chat_format: `plain`, `llava_plain`, `avsr`, `vicuna_v1`, or `chat` for the tokenizer's own template.
        placeholder_ids: per medium the id that stands for it.
        span_ids: per medium the ids before and after it.

    Raises:
        ValueError: an unknown format, or `chat` with a tokenizer that has no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_format: str,
        placeholder_ids: Mapping[str, int],
        span_ids: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        if chat_format not in FORMATS:
            raise ValueError(f"chat_format is {chat_format!r}; allowed: {', '.join(FORMATS)}")
        if chat_format == "chat" and not tokenizer.chat_template:
            raise ValueError("chat_format is 'chat', but the tokenizer has no chat template; use plain or vicuna_v1")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one is needed")
        self.tokenizer = tokenizer
        self.going_on = without_prefix(tokenizer)
        self.chat_format = chat_format
        self.template = TEMPLATES.get(chat_format)
        self.placeholder_ids = dict(placeholder_ids)
        self.span_ids = {medium: (list(before), list(after)) for medium, (before, after) in (span_ids or {}).items()}
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
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
        plans = [self._pieces(self._read(messages), add_generation_prompt) for messages in conversations]
        known = self._tokenized([piece for plan in plans for piece in plan])
        prompts = []
        for messages, plan in zip(conversations, plans, strict=True):
            ids: list[int] = []
            labels: list[int] = []
            for piece in plan:
                new = piece.ids if piece.ids is not None else known[_key(piece)]
                num = len(new) if piece.num_targets == _ALL else piece.num_targets
                ids += new
                labels += [*new[:num], *[IGNORED_LABEL] * (len(new) - num)]
            media = tuple(part.medium for message in messages for part in message.parts if isinstance(part, Media))
            prompts.append(Prompt(ids, labels, media))
        return prompts

    def _read(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages the format has a place for: all, or in `llava_plain` the media of a question and its answer."""
        if self.chat_format != "llava_plain":
            return messages
        roles = [message.role for message in messages]
        media = [part for part in messages[0].parts if isinstance(part, Media)] if messages else []
        if roles not in (["user"], ["user", "assistant"]) or not media:
            raise ValueError(
                f"chat_format llava_plain is for one question with a picture and its answer, got {', '.join(roles)} "
                f"with {len(media)} media; use vicuna_v1"
            )
        return [Message("user", tuple(media)), *messages[1:]]

    def _tokenized(self, pieces: Sequence[_Piece]) -> dict[tuple[str, bool, bool], list[int]]:
        """Ids of every distinct text, with one call of the tokenizer for each way of reading."""
        wanted = dict.fromkeys(_key(piece) for piece in pieces if piece.ids is None)
        known: dict[tuple[str, bool, bool], list[int]] = {}
        for is_written in (False, True):
            for continues in (False, True):
                own = [key for key in wanted if key[1:] == (is_written, continues) and key[0]]
                tokenizer = self.going_on if continues else self.tokenizer
                texts = [key[0] for key in own]
                if own:
                    read = tokenizer(texts, add_special_tokens=False, split_special_tokens=is_written)["input_ids"]
                    known.update(zip(own, read, strict=True))
        return known | {key: [] for key in wanted if not key[0]}

    def _pieces(self, messages: Sequence[Message], prompt: bool) -> list[_Piece]:
        """A conversation in pieces: template text and what people wrote by turns.

        A space before a written part is handed to the part: tokenizers join it to the word after it, so
        "ASSISTANT: red" must be cut before the space, not after.
        """
        parts = [(message.role, part) for message in messages for part in message.parts]
        rendered, pieces = self._rendered(messages, len(parts), prompt), list[_Piece]()
        bos = self.tokenizer.bos_token
        if self.template is not None and bos and rendered[0].startswith(bos):  # what comes after it begins anew
            rendered[0] = rendered[0].removeprefix(bos)
            pieces.append(_Piece(ids=(self.tokenizer.bos_token_id,)))
        continues = answering = False
        for position, text in enumerate(rendered):
            follower = parts[position][1] if position < len(parts) else None
            glue = " " if text.endswith(" ") and (follower is None or isinstance(follower, Text)) else ""
            text = text.removesuffix(glue)
            pieces += self._template_pieces(text, continues=continues, ends_answer=answering)
            answering = answering and not text
            continues = continues or bool(text)
            if follower is None:
                break
            answering = parts[position][0] == "assistant"
            if isinstance(follower, Text):
                num_targets = _ALL if answering else _NOTHING
                pieces.append(_Piece(glue + follower.text, None, True, continues, num_targets))
                continues = True
            else:
                pieces.append(_Piece(ids=self._media_ids(follower)))
                continues = False
        return pieces

    def _rendered(self, messages: Sequence[Message], num_parts: int, prompt: bool) -> list[str]:
        """The template's text before, between and after the parts of a conversation."""
        marks = iter(range(num_parts))
        marked = [
            {"role": message.role, "content": "".join(f"\ue000{next(marks)}\ue001" for _ in message.parts)}
            for message in messages
        ]
        rendered = self.tokenizer.apply_chat_template(
            marked, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )
        split = _MARK.split(rendered)
        if [int(number) for number in split[1::2]] != list(range(num_parts)):
            raise ValueError("the tokenizer's chat template drops, repeats or reorders what people wrote")
        return split[::2]

    def _template_pieces(self, text: str, *, continues: bool, ends_answer: bool) -> list[_Piece]:
        """Template text, cut before its first special token, which tokenizers part from what stands before it.

        After an answer that special token ends the turn and is learned, with what stands before it; without one
        nothing is, but the line break of `llava_plain`.
        """
        if not text:
            return []
        first = self._special.search(text)
        if first is None:
            learned = ends_answer and self.chat_format == "llava_plain"
            return [_Piece(text, None, False, continues, _ALL if learned else _NOTHING)]
        before = _Piece(text[: first.start()], None, False, continues, _ALL if ends_answer else _NOTHING)
        return [before, _Piece(text[first.start() :], num_targets=int(ends_answer))]

    def _media_ids(self, part: Media) -> tuple[int, ...]:
        if part.medium not in self.placeholder_ids:
            allowed = ", ".join(self.placeholder_ids) or "text only"
            raise ValueError(f"this model does not take {part.medium}; it takes {allowed}")
        before, after = self.span_ids.get(part.medium, ([], []))
        return (*before, self.placeholder_ids[part.medium], *after)


def without_prefix(tokenizer: Any) -> Any:
    """The tokenizer for text that goes on: without the space that SentencePiece vocabularies put before a new text.

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
    """The steps of a normaliser or pre-tokeniser, which may be a sequence of them."""
    if state is None:
        return []
    return state.get("normalizers") or state.get("pretokenizers") or [state]


def _key(piece: _Piece) -> tuple[str, bool, bool]:
    return piece.text, piece.is_written, piece.continues
