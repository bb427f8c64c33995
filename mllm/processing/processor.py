"""Turns text, media and a budget into the inputs of the model: the processor.

Knows the tokenizer, the chat format, the budget space, and what adapters have experts for. How media become inputs of
encoders is in `media_loading.py`. Does not know weights, training or metrics. Everything it makes is on the host.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.adapters.expert_ids import NO_EXPERT_NAMES, expert_names_of
from mllm.budget import MEDIA, Budget
from mllm.config.medium import FramesConfig, MediumConfig
from mllm.config.processor import ProcessorConfig
from mllm.config.reading import plain, read
from mllm.data.manifest import Message, Sample
from mllm.hosts import HostProcessor
from mllm.media import DEFAULT_LIMITS, FrameSampling, MediaLimits
from mllm.model.configuration import FILE as MODEL_FILE
from mllm.model.configuration import ElasticConfig
from mllm.processing.batch import Batch, EncodedSample, Expanded, MediaSpan, check_length, expand
from mllm.processing.chat import ChatEncoder, Prompt
from mllm.processing.chat_template import with_media_parts
from mllm.processing.host_chat import HostChatEncoder
from mllm.processing.host_positions import position_inputs
from mllm.processing.media_inputs import ItemNumbers, LoadedMedia, as_long_as_longest, stack_media
from mllm.processing.media_loading import MediaLoading
from mllm.processing.preprocessing import FILE, check_files, check_has_config, check_keys
from mllm.processing.processor_calls import ProcessorCalls
from mllm.processing.requests import SEPARATORS

PLACEHOLDER_TOKENS = {medium: f"<|{medium}_token|>" for medium in MEDIA}
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ElasticProcessor(MediaLoading, ProcessorCalls):
    """Makes model inputs from conversations with media.

    Args:
        tokenizer: a fast tokenizer that holds the placeholder tokens.
        config: of the model: its media, their encoders and budgets, and what its adapter has LoRAs or routers for. It
            is the model's own file and not saved here.
        elastic: what a processor has beside that, or its plain values.

    Raises:
        ValueError: placeholders the tokenizer does not hold, ids that are not the tokenizer's, or files made for other
            encoders than the model's; the file and the key are named.
    """

    def __init__(
        self, tokenizer: Any, config: ElasticConfig, elastic: ProcessorConfig | Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.settings = elastic if isinstance(elastic, ProcessorConfig) else _read_settings(elastic)
        # What files may be, where no loader says it; a matter of the machine that reads, and saved nowhere.
        self.limits: MediaLimits = DEFAULT_LIMITS
        self.media: dict[str, MediumConfig] = dict(config.media or {})
        self.encoder_configs = config.encoder_configs
        self.space = config.space
        self.context_tokens = _context_tokens(config)
        self.expert_names = expert_names_of(config.adapter)
        frames = {m: block.encoder for m, block in self.media.items() if isinstance(block.encoder, FramesConfig)}
        self.sampling = {m: FrameSampling(one.count, one.frames_per_second) for m, one in frames.items()}
        self.host = None
        if (config.host_config is None) != (self.settings.host is None):
            has, lacks = (FILE, MODEL_FILE) if self.settings.host is not None else (MODEL_FILE, FILE)
            raise ValueError(f"{has} has a host, but {lacks} has not (elastic.host and host_config)")
        if config.host_config is not None:
            self.host = HostProcessor(config.host_config, self.settings.host or {}, tokenizer)
            self.space = self.space.resized_by(self.host.resizing)
        self.placeholder_ids = {m: self._placeholder_id(m) for m in self.media}
        self.span_ids = {m: [[self._token_id(token)] for token in b.span] for m, b in self.media.items() if b.span}
        check_files(config, tokenizer, self.placeholder_ids, self.settings.preprocessors)
        self.prompts = {tuple(name.split("+")): text for name, text in self.settings.prompts.items()}
        self.shares_lengths = self.settings.shares_lengths
        if self.host is not None:
            self.chat = HostChatEncoder(tokenizer, self.host)
            self.chat_template = self.host.chat_template if self.chat.is_typed else with_media_parts(self.chat)
            return
        self.chat = ChatEncoder(
            tokenizer,
            chat_format=self.settings.chat_format,
            placeholder_ids=self.placeholder_ids,
            span_ids=self.span_ids,
            names_images=self.settings.names_images,
        )
        self.chat_template = with_media_parts(self.chat, separator=self.separator)

    def _placeholder_id(self, medium: str) -> int:
        """Return the id of a medium's placeholder: a token that was added for it, or the host's own."""
        if self.host is not None:
            return self.host.placeholder_id
        return self._token_id(PLACEHOLDER_TOKENS[self._encoded_as(medium)])

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read what is kept of a processor, and the model's config beside it.

        Args:
            kwargs: of transformers, and `elastic_config`, the config of the model where it is at hand.
        """
        config = kwargs.pop("elastic_config", None)
        if config is None and os.path.isdir(pretrained_model_name_or_path):
            check_has_config(pretrained_model_name_or_path)
        located = {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
        values, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        check_keys(values)
        config = ElasticConfig.from_pretrained(pretrained_model_name_or_path, **located) if config is None else config
        return {**values, "config": config}, rest

    @classmethod
    def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
        kwargs.pop("elastic_config", None)  # no keyword of tokenizers
        return super()._get_arguments_from_pretrained(*args, **kwargs)

    @property
    def separator(self) -> str:
        """What stands between media and a question in published data of the chat format."""
        return SEPARATORS.get(self.settings.chat_format, "")

    def forget_experts(self) -> None:
        """Give rows no ids of scales and tasks from now on, for a model whose adapter has been merged."""
        self.expert_names = NO_EXPERT_NAMES

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer does not hold the token {token!r}")
        return token_id

    @property
    def pad_id(self) -> int:
        """What rows are padded with; never looked at."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else 0

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved beside the tokenizer."""
        return {"processor_class": type(self).__name__, "elastic": plain(self.settings)}

    def batch(
        self,
        samples: Sequence[Sample],
        media: Sequence[Sequence[LoadedMedia]],
        *,
        for_training: bool,
        prompts: Sequence[Prompt] | None = None,
        with_values: bool = True,
    ) -> Batch:
        """Encode conversations and stack the inputs of their encoders.

        Args:
            samples: conversations; without `for_training` a last assistant message is left out and asked for instead.
            prompts: the conversations where they are encoded already, in some other way.
            with_values: false where the rows are wanted alone, without the inputs of encoders.
            media: the loaded media of each sample, in order of appearance. Samples that are given the same object are
                shown the same encoded item.

        Raises:
            ValueError: media that do not match the conversation, or a clip its encoder cannot take; the sample is
                named.
        """
        if self.shares_lengths:
            media = as_long_as_longest(media)
        numbers = ItemNumbers()
        rows = []
        for number, (sample, items) in enumerate(zip(samples, media, strict=True)):
            messages = sample.messages if for_training else without_answer(sample.messages)
            try:
                asks = not for_training or messages[-1].role != "assistant"
                prompt = prompts[number] if prompts else self.chat(messages, add_generation_prompt=asks)
            except ValueError as error:
                raise ValueError(f"sample {sample.id!r}: {error}") from error
            if prompt.media != tuple(item.medium for item in items):
                got = ", ".join(item.medium for item in items) or "none"
                raise ValueError(
                    f"sample {sample.id!r} speaks of {', '.join(prompt.media) or 'no media'}, but has {got}"
                )
            try:
                spans = tuple(
                    MediaSpan(
                        self.extent(item),
                        numbers(item),
                        item.tilings,
                        item.encoded_as,
                        item.views,
                        item.estimated_snr_db,
                    )
                    for item in items
                )
            except ValueError as error:
                raise ValueError(f"sample {sample.id!r}: {error}") from error
            rows.append(EncodedSample(sample.id, prompt.ids, prompt.labels, spans, sample.task))
        return Batch(rows, stack_media(numbers.items if with_values else ()))

    def expand(
        self, batch: Batch, budgets: Sequence[Sequence[Budget]], *, left_padding: bool, share_prefixes: bool = False
    ) -> Expanded:
        """Model inputs of a batch at one or more budgets per row; see `mllm.processing.batch.expand`.

        Raises:
            ValueError: as there, or a row longer than the LLM reads; the sample is named.
        """
        expanded = expand(
            batch,
            budgets,
            space=self.space,
            placeholder_ids=self.placeholder_ids,
            pad_id=self.pad_id,
            left_padding=left_padding,
            expert_names=self.expert_names,
            share_prefixes=share_prefixes,
        )
        for row, costs in zip(itertools.cycle(batch.rows), expanded.token_counts, strict=False):
            check_length(row, costs, self.context_tokens)
        if self.shares_lengths and not left_padding:
            expanded.inputs["attention_mask"].fill_(1)
        if self.host is not None and self.host.family.has_grid_positions:
            whole_maps = self.space.media["image"].whole_maps
            expanded.inputs.update(
                position_inputs(batch.rows, expanded, self.host.placeholder_id, whole_maps=whole_maps)
            )
        return expanded

    @property
    def shares_beginnings(self) -> bool:
        """Whether prompts can be read in parts: no token of them sees what stands behind it."""
        return self.host is None or self.host.family.shares_beginnings


def without_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation up to what the last assistant message answers."""
    return tuple(messages[:-1]) if messages and messages[-1].role == "assistant" else tuple(messages)


def _read_settings(values: Mapping[str, Any]) -> ProcessorConfig:
    try:
        return read(ProcessorConfig, values, path="elastic")
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from error


def _context_tokens(config: ElasticConfig) -> int | None:
    """Return how much the LLM reads; longer rows are refused."""
    limit = getattr(config.text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
