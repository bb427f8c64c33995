"""Turns text, media and a budget into the inputs of the model: the processor.

Knows the tokenizer, the chat format, what each encoder wants to be fed, and the budget space.
Does not know weights, training or metrics. Everything it makes is on the host.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm.adapters.expert_ids import NO_EXPERT_NAMES, expert_names_of
from mllm.budget import MEDIA, Budget, Extent
from mllm.budget.resolution import Resolution
from mllm.budget.tiling import Size, Tiles, Tiling
from mllm.config.medium import FramesConfig, MediumConfig
from mllm.config.processor import ProcessorConfig
from mllm.config.reading import plain, read
from mllm.data.av_pairs import clip_pairs
from mllm.data.manifest import Message, Sample
from mllm.encoders import EncoderFacts, encoder_facts
from mllm.hosts import HostProcessor, host_facts
from mllm.media import (
    DEFAULT_LIMITS,
    Audio,
    FrameSampling,
    InMemoryMedium,
    MediaLimits,
    MediaLoader,
    Reader,
    audio_as_long_as_video,
    decode_in_memory,
    resolve_media,
)
from mllm.model.configuration import FILE as MODEL_FILE
from mllm.model.configuration import ElasticConfig
from mllm.processing.batch import Batch, EncodedSample, Expanded, MediaSpan, check_length, expand
from mllm.processing.chat import ChatEncoder, Prompt
from mllm.processing.chat_template import with_media_parts
from mllm.processing.host_chat import HostChatEncoder
from mllm.processing.host_positions import position_inputs
from mllm.processing.media_inputs import (
    HostView,
    ItemNumbers,
    LoadedMedia,
    as_long_as_longest,
    cut_image,
    cuts_of,
    refusal,
    resolutions_of,
    stack_media,
)
from mllm.processing.preprocessing import FILE, check_files, check_has_config, check_keys, preprocessor_values
from mllm.processing.processor_calls import ProcessorCalls
from mllm.processing.requests import SEPARATORS
from mllm.transforms.augmentation import Augmentation, RngFor, rngs_by_purpose
from mllm.transforms.encoder_inputs import ImageTransform, MediaTransform, build_transform
from mllm.transforms.noise import estimated_snr_db

PLACEHOLDER_TOKENS = {medium: f"<|{medium}_token|>" for medium in MEDIA}
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ElasticProcessor(ProcessorCalls):
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

    def _encoded_as(self, medium: str) -> str:
        """The medium whose encoder, compressor and placeholder a medium uses."""
        return "image" if medium in self.sampling else medium

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

    @cached_property
    def facts(self) -> dict[str, EncoderFacts]:
        """Return what the encoders publish, by medium."""
        if self.host is not None:
            return {medium: host_facts(self.host.config) for medium in self.media}
        encoded_as = {medium: self._encoded_as(medium) for medium in self.media}
        return {m: encoder_facts(self.encoder_configs[t], self.media[t].encoder) for m, t in encoded_as.items()}

    @cached_property
    def transforms(self) -> dict[str, MediaTransform]:
        """Return what makes an encoder's input of a decoded file, by medium; a host's processor makes its own."""
        if self.host is not None:
            return {}
        encoded_as = {medium: self._encoded_as(medium) for medium in self.media}
        return {m: build_transform(t, self.encoder_configs[t], self.preprocessor(m)) for m, t in encoded_as.items()}

    def preprocessor(self, medium: str) -> dict[str, Any]:
        """Return the plain values by which files of a medium are made into encoder input, its block's word included."""
        encoded_as = self._encoded_as(medium)
        values = self.settings.preprocessors.get(encoded_as, {})
        return preprocessor_values(self.media[encoded_as].encoder, self.encoder_configs[encoded_as], values)

    @property
    def window_seconds(self) -> float | None:
        """Longest audio that its encoder takes, in seconds; None where any length will do."""
        if self.host is not None:
            return None if self.host.family.clips is None else self.host.family.clips.window_seconds
        return getattr(self.transforms["audio"], "window_seconds", None) if "audio" in self.transforms else None

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved beside the tokenizer."""
        return {"processor_class": type(self).__name__, "elastic": plain(self.settings)}

    def load_media(
        self,
        sample: Sample,
        *,
        generator: np.random.Generator | None = None,
        loader: Reader | None = None,
        noise: Callable[[Audio], Audio] | None = None,
        augmentation: Augmentation | None = None,
        budgets: Sequence[Budget] = (),
        in_memory: Sequence[InMemoryMedium | None] = (),
    ) -> list[LoadedMedia]:
        """Decode and transform the media of a sample, in order of appearance.

        Audio and video of one clip (see `mllm.data.av_pairs`) are brought to one length first. An image that is cut
        into tiles is cut as each of the budgets asks, and into the most tiles where there is none; what several budgets
        share is there once.

        Args:
            generator: randomness of training augmentation; none for evaluation. Each medium and purpose draws from a
                generator of its own, made of this one.
            loader: limits and decoders other than the default ones.
            noise: what becomes of each audio between its file and its transform.
            augmentation: done before that, where there is a generator.
            budgets: what the sample is going to be asked at.
            in_memory: what was handed over in place of files, per medium of the sample; None where it is a file.

        Raises:
            MediaError: a file that is missing, broken, over a limit or outside the root, audio and video of one
                clip that are not equally long, or what its encoder cannot take.
            ValueError: a medium this model does not take, or noise that cannot be mixed; the file is named.
        """
        raws = self.read_media(sample, loader, in_memory=in_memory)
        return self.prepare_media(
            sample,
            raws,
            generator=generator,
            noise=noise,
            augmentation=augmentation,
            budgets=budgets,
            in_memory=in_memory,
        )

    def prepare_media(
        self,
        sample: Sample,
        raws: Sequence[Any],
        *,
        generator: np.random.Generator | None = None,
        noise: Callable[[Audio], Audio] | None = None,
        augmentation: Augmentation | None = None,
        budgets: Sequence[Budget] = (),
        in_memory: Sequence[InMemoryMedium | None] = (),
    ) -> list[LoadedMedia]:
        """Transform the decoded media of a sample, as `load_media` does once it has read them.

        Args:
            raws: of `read_media`, or stretches of those; the rest is as in `load_media`.

        Raises:
            MediaError, ValueError: as `load_media`.
        """
        rng_for = None if generator is None else rngs_by_purpose(generator)
        loaded: list[LoadedMedia | None] = []
        for number, (part, raw) in enumerate(zip(sample.media, raws, strict=True)):
            item_rng = None if rng_for is None else _numbered(rng_for, number)
            if self._encoded_as(part.medium) == "image" and self.host is None:
                loaded.append(self._images(part.medium, raw))
                continue
            try:
                if item_rng is not None and augmentation is not None:
                    raw = augmentation(raw, item_rng)
                if noise is not None and isinstance(raw, Audio):
                    raw = noise(raw)
            except ValueError as error:
                raise ValueError(f"{part.medium} {part.path}: {error}") from error
            resolutions = self._resolutions(raw, budgets)
            try:
                if self.host is not None:
                    loaded.append(self._of_host(part.medium, raw, resolutions))
                else:
                    loaded.append(self.transform(part.medium, raw, generator=item_rng and item_rng("transform")))
            except ValueError as error:
                is_in_memory = bool(in_memory) and in_memory[number] is not None
                raise refusal(error, part.path if is_in_memory else resolve_media(sample.root, part.path)) from error
        return self._with_tiles(loaded, raws, budgets)

    def _images(self, medium: str, raw: Any) -> LoadedMedia | None:
        """An image or the frames of a video; nothing yet of an image that is to be cut into tiles."""
        if medium in self.sampling:
            frames = [self.transforms[medium](Image.fromarray(frame))[0] for frame in raw.frames]
            return LoadedMedia(medium, torch.stack(frames), len(frames), encoded_as="image")
        return None if self.tiling is not None else self.transform(medium, raw)

    def _with_tiles(
        self, loaded: Sequence[LoadedMedia | None], raws: Sequence[Any], budgets: Sequence[Budget]
    ) -> list[LoadedMedia]:
        """The media, with every image that is not there yet cut as the budgets ask."""
        whole = [item for item in loaded if item is not None]
        if len(whole) == len(loaded):
            return whole
        extents = [
            self.image_extent((raw.height, raw.width)) if item is None else self.extent(item)
            for item, raw in zip(loaded, raws, strict=True)
        ]
        cuts = cuts_of(extents, budgets, self.space)
        return [
            self._cut(raw, tiles) if item is None else item for item, raw, tiles in zip(loaded, raws, cuts, strict=True)
        ]

    def _cut(self, raw: Any, tilings: tuple[Tiles, ...]) -> LoadedMedia:
        tile = self.facts["image"].image_pixels
        assert self.tiling is not None
        assert tile is not None
        transform = self.transforms["image"]
        assert isinstance(transform, ImageTransform)
        return cut_image(raw, tilings, transform, tile=tile, thumbnail=self.tiling.thumbnail)

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles here, if they are; a host cuts them itself."""
        return self.space.media["image"].tiling if "image" in self.space.media and self.host is None else None

    @property
    def loads_by_budget(self) -> bool:
        """Whether what is loaded of an image depends on the budget: its tiles, or the resolutions a host sees it at."""
        return self.tiling is not None or (self.host is not None and self.host.resizing is not None)

    def read_media(
        self, sample: Sample, loader: Reader | None = None, *, in_memory: Sequence[InMemoryMedium | None] = ()
    ) -> list[Any]:
        """Decoded media of a sample in order of appearance, audio as long as the videos they belong to.

        Args:
            loader, in_memory: as in `load_media`; what is in memory needs a `MediaLoader`, which says at what rates.

        Raises:
            MediaError, ValueError: as `load_media`.
        """
        read = loader or MediaLoader(gray=True, limits=self.limits)
        for part in sample.media:
            self._check_medium(part.medium)
        paths: list[Any] = []
        raws: list[Any] = []
        for part, value in zip(sample.media, in_memory or [None] * len(sample.media), strict=True):
            sampling = self.sampling.get(part.medium)
            if value is not None:
                assert isinstance(read, MediaLoader)
                paths.append(part.path)
                raws.append(decode_in_memory(value, read, sampling))
            else:
                paths.append(resolve_media(sample.root, part.path))
                raws.append(read(part.medium, paths[-1]) if sampling is None else read.frames(paths[-1], sampling))
        limit = read.max_mismatch_seconds
        for audio, video in clip_pairs(sample) if limit is not None and "video" not in self.sampling else []:
            assert limit is not None
            raws[audio] = audio_as_long_as_video(
                raws[audio],
                raws[video],
                path=paths[audio],
                max_mismatch_seconds=limit,
            )
        return raws

    def transform(
        self,
        medium: str,
        raw: Any,
        *,
        generator: np.random.Generator | None = None,
        budgets: Sequence[Budget] = (),
    ) -> LoadedMedia:
        """Turn a decoded image, clip or video into what its encoder takes.

        Args:
            generator: as in `load_media`.
            budgets: what it is going to be asked at: an image is cut into tiles, or seen, as each of them asks; into
                the most tiles, and at its host's own resolution, without any.

        Raises:
            ValueError: a medium this model does not take, or budgets none of which can be met.
        """
        self._check_medium(medium)
        if self.host is not None:
            return self._of_host(medium, raw, self._resolutions(raw, budgets))
        if self._encoded_as(medium) == "image" and (medium in self.sampling or self.tiling is not None):
            return self._with_tiles([self._images(medium, raw)], [raw], budgets)[0]
        values, raw_length = self.transforms[medium](raw, generator=generator)
        if self.facts[medium].max_patches is not None:
            return LoadedMedia(medium, values.flatten(0, 1), raw_length, (values.shape[0], values.shape[1]))
        is_heard = isinstance(raw, Audio) and generator is None  # training never looks at the estimate
        return LoadedMedia(medium, values, raw_length, estimated_snr_db=estimated_snr_db(raw) if is_heard else None)

    def _resolutions(self, raw: Any, budgets: Sequence[Budget]) -> list[Resolution]:
        """The resolutions at which budgets want an image of a host to be seen; none where there is no choice."""
        if self.host is None or self.host.resizing is None or isinstance(raw, Audio):
            return []
        return resolutions_of(self.host.resizing, (raw.height, raw.width), budgets)

    def _of_host(self, medium: str, raw: Any, resolutions: Sequence[Resolution]) -> LoadedMedia:
        """A medium item as its host wants it, an image once at each of the resolutions."""
        assert self.host is not None
        if resolutions:
            return self._resized(self.host, raw, resolutions)
        item = self.host(raw)
        return LoadedMedia(
            medium,
            item.values,
            item.raw_length,
            item.grid,
            num_features=item.tokens,
            views=(HostView(item.ids, item.num_placeholders, item.breaks),),
            estimated_snr_db=estimated_snr_db(raw) if isinstance(raw, Audio) else None,
        )

    def _resized(self, host: HostProcessor, raw: Any, resolutions: Sequence[Resolution]) -> LoadedMedia:
        items = [host(raw, resolution) for resolution in resolutions]
        views = tuple(
            HostView(
                item.ids,
                item.num_placeholders,
                item.breaks,
                item.grid,
                None if one.setting is None else one,
                item.num_items,
            )
            for item, one in zip(items, resolutions, strict=True)
        )
        if items[0].maps:
            pieces = [piece for item in items for piece in item.values]
            values = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        elif len(items) == 1 or items[0].grid is None:
            values = torch.cat([item.values for item in items])
        else:
            values = torch.nn.utils.rnn.pad_sequence([item.values for item in items], batch_first=True)
        return LoadedMedia(
            "image",
            values,
            1,
            image_pixels=(raw.height, raw.width),
            tilings=tuple(item.tiles for item in items if item.tiles is not None),
            views=views,
            maps=tuple(sizes for item in items for sizes in item.maps),
        )

    def _check_medium(self, medium: str) -> None:
        if medium not in self.placeholder_ids:
            allowed = ", ".join(self.placeholder_ids) or "text only"
            raise ValueError(f"this model does not take {medium}; it takes {allowed}")

    def extent(self, loaded: LoadedMedia) -> Extent:
        """Return what the budget needs to know of a medium."""
        facts = self.facts[loaded.medium]
        if loaded.image_pixels is not None:
            return self.image_extent(loaded.image_pixels)
        if facts.grid is not None:
            return Extent(loaded.medium, grid=loaded.grid or facts.grid, num_images=loaded.num_items)
        if self.host is not None:
            return Extent(loaded.medium, num_frames=loaded.num_features, frames_per_second=facts.frames_per_second)
        assert facts.num_frames is not None
        frames = facts.num_frames(loaded.raw_length)
        return Extent(loaded.medium, num_frames=frames, frames_per_second=facts.frames_per_second)

    def image_extent(self, image_pixels: Size) -> Extent:
        """Return the extent of an image that may be cut into tiles, or be seen by its host at several resolutions.

        Raises:
            ValueError: an encoder without a size of its own.
        """
        facts = self.facts["image"]
        if self.host is not None and self.host.resizing is not None and self.host.tiling is None:
            default = self.host.resizing.default(image_pixels)
            grid = default.grid or facts.grid
            return Extent("image", grid=grid, image_pixels=image_pixels, num_images=default.num_images)
        if facts.image_pixels is None:
            raise ValueError("model.image.tiling needs an encoder that reads images of one size; leave it out")
        return Extent("image", grid=facts.grid, image_pixels=image_pixels, tile_pixels=facts.image_pixels)

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


def _numbered(rng_for: RngFor, number: int) -> RngFor:
    """Generators of one medium of a sample."""
    return lambda purpose: rng_for(f"{purpose} {number}")


def _read_settings(values: Mapping[str, Any]) -> ProcessorConfig:
    try:
        return read(ProcessorConfig, values, path="elastic")
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from error


def _context_tokens(config: ElasticConfig) -> int | None:
    """Return how much the LLM reads; longer rows are refused."""
    limit = getattr(config.text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
