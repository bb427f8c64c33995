"""Encodes conversations for a host: by its own chat template, its own placeholder and whatever it begins prompts with.

Knows a host's processor and tokenizer. Does not know media, tiles or budgets; the host's tags around an item are put in
when rows are expanded.

Templates of hosts take messages of typed parts and write a token of text where a medium stands, in the order they like:
LLaVA's puts all images first. A few take texts alone, in which that token stands already.
"""

from collections.abc import Sequence
from typing import Any

from mllm.data.manifest import Media, Message, Part, Text
from mllm.hosts import HostProcessor
from mllm.hosts.channels import PrefixTypes
from mllm.processing.chat import ChatEncoder, Layout, RefusedConversation, mark


class HostChatEncoder(ChatEncoder):
    """Encodes conversations as the host's own processor does.

    Args:
        tokenizer: of the host, a fast one.
        host: its processor.

    Raises:
        ValueError: a template that shows a medium in neither of the two ways.
    """

    keeps_last_space = True
    brings_template = True

    def __init__(self, tokenizer: Any, host: HostProcessor) -> None:
        super().__init__(tokenizer, chat_format="chat", placeholder_ids={host.medium: host.placeholder_id})
        self.host = host
        self.template = host.chat_template
        self._placeholder: str = tokenizer.convert_ids_to_tokens(host.placeholder_id)
        self.is_typed = True
        if not self._shows_media():
            self.is_typed = False
            if not self._shows_media():
                raise ValueError("the host's chat template shows no media, in typed parts or in a text")

    def _plan(self, messages: Sequence[Message], prompt: bool) -> tuple[Layout, list[str]]:
        # Layouts are kept, and what people write is no part of them.
        if isinstance(self.host.family.channels, PrefixTypes):
            answers = [part for message in messages if message.role == "assistant" for part in message.parts]
            if any(isinstance(part, Text) and "\n" in part.text for part in answers):
                raise RefusedConversation(f"a {self.host.config.model_type} gives answers of one line alone")
        images = self.host.family.images
        if images is not None and images.shows_one:
            num_media = sum(isinstance(part, Media) for message in messages for part in message.parts)
            if num_media > 1:
                name = self.host.config.model_type
                raise RefusedConversation(
                    f"a {name} sees each of several images as one small square, which is not supported yet; give one "
                    f"image, got {num_media}"
                )
        return super()._plan(messages, prompt)

    def _shows_media(self) -> bool:
        probe = [Message("user", (Media(self.host.medium, ""), Text("a")))]
        try:
            self._rendered(probe, 1, True)
        except RefusedConversation:
            return False
        return True

    def _cut_at(self, messages: Sequence[Message]) -> list[tuple[str, Part]]:
        return [part for part in super()._cut_at(messages) if isinstance(part[1], Text)]

    def _take_beginning(self, rendered: list[str]) -> tuple[int, ...]:
        # As transformers' processors do: what the tokenizer begins texts with, unless the template has written it.
        bos = self.tokenizer.bos_token
        return () if bos is not None and rendered[0].startswith(bos) else self.host.beginning

    def _marked(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        marked, number = [], 0
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, Media):
                    parts.append({"type": part.medium})
                else:
                    parts.append({"type": "text", "text": mark(number)})
                    number += 1
            text = "".join(part.get("text", self.host.media_token) for part in parts)
            marked.append({"role": message.role, "content": parts if self.is_typed else text})
        return marked

    def _rendered(self, messages: Sequence[Message], num_parts: int, prompt: bool) -> list[str]:
        rendered = super()._rendered(messages, num_parts, prompt)
        media = [part for message in messages for part in message.parts if isinstance(part, Media)]
        if unknown := [part.medium for part in media if part.medium != self.host.medium]:
            raise ValueError(f"this model does not take {unknown[0]}; it takes {self.host.medium}")
        # Some hosts write a token in texts that stands for no soft token, and that their tokenizers do not even hold.
        token = self.host.media_token
        if (shown := sum(text.count(token) for text in rendered)) != len(media):
            raise RefusedConversation(f"the host's chat template shows {shown} media where there are {len(media)}")
        return [text.replace(token, self._placeholder) for text in rendered]
