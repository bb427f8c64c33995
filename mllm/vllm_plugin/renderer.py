"""Turns the conversations of vLLM's own server into ids as `ElasticProcessor` does: what people wrote stays text.

Knows vLLM's renderers and our chat formats. Does not know media beyond where they stand.

vLLM's renderer writes a conversation as one text and tokenizes that whole, so that whoever types a special token has
made one: an end of turn, or a placeholder that no medium belongs to.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer

from mllm.processing.processor import ElasticProcessor
from mllm.processing.requests import read_chat

ALLOWED_OPTIONS = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "tokenize": False,
    "cohere_format": "cmd4",
}
"""Options of a chat template that are understood, with the value each must have.

The last is one family's, and vLLM's server sends its default to every model.
"""


class ElasticRenderer(HfRenderer):
    """Renders prompts of one model."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._processor = ElasticProcessor.from_pretrained(self.model_config.model, trust_remote_code=False)
        # The tokenizer is told by a switch of its own whether special tokens are text; see `mllm.serving.preparation`.
        self._lock = threading.Lock()

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """Render a conversation.

        Raises:
            ValueError: an option that our chat formats have not, or turns that the format has no place for.
        """
        conversation, media, uuids = parse_chat_messages(
            messages, self.model_config, content_format="openai", media_io_kwargs=params.media_io_kwargs
        )
        return conversation, self._prompt(conversation, media, uuids, params)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """Render a conversation whose media are fetched meanwhile; see `render_messages`."""
        conversation, media, uuids = await parse_chat_messages_async(
            messages, self.model_config, content_format="openai", media_io_kwargs=params.media_io_kwargs
        )
        return conversation, self._prompt(conversation, media, uuids, params)

    def _prompt(self, conversation: Sequence[Any], media: Any, uuids: Any, params: Any) -> dict[str, Any]:
        if params.chat_template is not None and params.chat_template != self._processor.chat_template:
            raise ValueError("chat_template is given; this model's prompts are written by its own chat format")
        for name, value in params.chat_template_kwargs.items():
            allowed = ALLOWED_OPTIONS.get(name)
            if value is not None and value != allowed:
                raise ValueError(f"{name} is {value!r}; allowed is {'nothing' if allowed is None else allowed}")
        prompt: dict[str, Any] = {"prompt_token_ids": self.ids_of(conversation)}
        if media is not None:
            prompt["multi_modal_data"] = media
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids
        return prompt

    def ids_of(self, conversation: Sequence[Mapping[str, Any]]) -> list[int]:
        """Encode a conversation with one placeholder per medium."""
        messages = [{"role": turn["role"], "content": _parts(turn["content"])} for turn in conversation]
        request = read_chat(messages, separator=self._processor.separator)
        with self._lock:
            return self._processor.chat(request.sample.messages, add_generation_prompt=True).ids

    def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        self._check_placeholders(prompt)
        return super()._process_tokens(prompt, skip_mm_cache=skip_mm_cache)

    async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        self._check_placeholders(prompt)
        return await super()._process_tokens_async(prompt, skip_mm_cache=skip_mm_cache)

    def _check_placeholders(self, prompt: Mapping[str, Any]) -> None:
        """Refuse a prompt without media that holds placeholders; with media the processor counts them.

        Raises:
            ValueError: it does.
        """
        placeholders = set(self._processor.placeholder_ids.values())
        if not prompt.get("multi_modal_data") and not placeholders.isdisjoint(prompt["prompt_token_ids"]):
            raise ValueError("the prompt holds a placeholder of media, but no media")


def _parts(content: Any) -> list[dict[str, Any]]:
    """Read the parts of a turn as vLLM has parsed them; what a medium holds is known elsewhere."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"], part["type"]: b""}
        for part in content
    ]
