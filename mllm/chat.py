"""From a conversation to token ids and labels, with one placeholder id where each medium stands.

Knows a tokenizer, a chat template and the ids around a medium. Does not know files, encoders or budgets.

Only the template may make special ids. What people wrote is tokenised apart from it, with special tokens read as plain
text, so that a user who types `<image>` or an end-of-turn marker has typed just that.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.data.manifest import Media, Message, Part, Text
from mllm.data.naming import named_pictures
from mllm.splice import IGNORED_LABEL

# `plain` is what the built-in world's LLM has read; `vicuna_v1` is the conversation form of LLaVA-1.5 (its
# conversation.py, "v1"); `avsr` is how Llama-AVSR, Llama-MTSK and Omni-AVSR put sound, lips, prompt and transcript side
# by side, without a space between them. `chat` stands for the template that came with the tokenizer.
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


@dataclass(frozen=True)
class Prompt:
    """Ids of a conversation with one placeholder per medium, labels, and the media in order of appearance."""

    ids: list[int]
    labels: list[int]
    media: tuple[str, ...]


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        chat_format: `plain`, `avsr`, `vicuna_v1`, or `chat` for the tokenizer's own template.
        placeholder_ids: per medium the id that stands for it.
        span_ids: per medium the ids before and after it.
        names_pictures: number the pictures of a conversation in the text; see `named_pictures`.

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
        names_pictures: bool = False,
    ) -> None:
        if chat_format not in FORMATS:
            raise ValueError(f"chat_format is {chat_format!r}; allowed: {', '.join(FORMATS)}")
        if chat_format == "chat" and not tokenizer.chat_template:
            raise ValueError("chat_format is 'chat', but the tokenizer has no chat template; use plain or vicuna_v1")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one is needed")
        self.names_pictures = names_pictures
        self.tokenizer = tokenizer
        self.template = TEMPLATES.get(chat_format)
        self.placeholder_ids = dict(placeholder_ids)
        self.span_ids = {medium: (list(before), list(after)) for medium, (before, after) in (span_ids or {}).items()}

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Prompt:
        """Encode a conversation; what assistants said, with the end of their turn, is the target.

        Raises:
            ValueError: a medium without a placeholder id, or a template that drops or repeats a message.
        """
        messages = named_pictures(messages) if self.names_pictures else messages
        parts = [(message.role, part) for message in messages for part in message.parts]
        pieces = self._render(messages, len(parts), add_generation_prompt)
        ids: list[int] = []
        labels: list[int] = []
        answering = False
        for piece in pieces:
            if isinstance(piece, tuple):
                index, glue = piece
                role, part = parts[index]
                new = self._part_ids(part, glue)
                answering = role == "assistant"
                targets = new if answering and isinstance(part, Text) else [IGNORED_LABEL] * len(new)
            else:
                new = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                targets = self._end_of_turn(new) if answering else [IGNORED_LABEL] * len(new)
                answering = answering and not new
            ids += new
            labels += targets
        media = tuple(part.medium for _, part in parts if isinstance(part, Media))
        return Prompt(ids, labels, media)

    def _render(self, messages: Sequence[Message], num_parts: int, prompt: bool) -> list[str | tuple[int, str]]:
        """Template text and part numbers by turns; a space before a written part is handed to the part.

        Tokenizers join a space to the word after it, so "ASSISTANT: red" must be cut before the space, not after.
        """
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
        written = [part for message in messages for part in message.parts]
        pieces: list[str | tuple[int, str]] = []
        for position, text in enumerate(split[::2]):
            followed = position < num_parts
            glue = " " if text.endswith(" ") and (not followed or isinstance(written[position], Text)) else ""
            pieces.append(text.removesuffix(glue))
            if followed:
                pieces.append((position, glue))
        return pieces

    def _part_ids(self, part: Part, glue: str) -> list[int]:
        if isinstance(part, Text):
            return self.tokenizer(glue + part.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if part.medium not in self.placeholder_ids:
            allowed = ", ".join(self.placeholder_ids) or "text only"
            raise ValueError(f"this model does not take {part.medium}; it takes {allowed}")
        before, after = self.span_ids.get(part.medium, ([], []))
        return [*before, self.placeholder_ids[part.medium], *after]

    def _end_of_turn(self, ids: list[int]) -> list[int]:
        """Labels of the template text after an answer: its first special id ends the turn and is learned."""
        special = set(self.tokenizer.all_special_ids)
        end = next((index for index, token in enumerate(ids) if token in special), -1)
        return [token if index <= end else IGNORED_LABEL for index, token in enumerate(ids)]
