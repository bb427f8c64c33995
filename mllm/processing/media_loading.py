"""Reads the media of samples and makes inputs of encoders of them.

Knows what each encoder or host wants to be fed, tiles, and the resolutions that budgets ask for. Does not know text,
batches, or how budgets are expanded.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from mllm.budget import Budget, Extent, Space
from mllm.budget.resolution import Resolution
from mllm.budget.tiling import Size, Tiles, Tiling
from mllm.config.medium import MediumConfig
from mllm.config.processor import ProcessorConfig
from mllm.data.av_pairs import clip_pairs
from mllm.data.manifest import Sample
from mllm.encoders import EncoderFacts, encoder_facts
from mllm.hosts import HostProcessor, host_facts
from mllm.media import (
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
from mllm.processing.media_inputs import HostView, LoadedMedia, cut_image, cuts_of, refusal, resolutions_of
from mllm.processing.preprocessing import preprocessor_values
from mllm.transforms.augmentation import Augmentation, RngFor, rngs_by_purpose
from mllm.transforms.encoder_inputs import ImageTransform, MediaTransform, build_transform
from mllm.transforms.noise import estimated_snr_db


class MediaLoading:
    """Holds the part of `ElasticProcessor` that reads media, transforms them and says how large they are.

    The processor gives it what it stands on.
    """

    settings: ProcessorConfig
    limits: MediaLimits
    media: dict[str, MediumConfig]
    encoder_configs: dict[str, PreTrainedConfig]
    space: Space
    sampling: dict[str, FrameSampling]
    host: HostProcessor | None
    placeholder_ids: dict[str, int]

    def _encoded_as(self, medium: str) -> str:
        """The medium whose encoder, compressor and placeholder a medium uses."""
        return "image" if medium in self.sampling else medium

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


def _numbered(rng_for: RngFor, number: int) -> RngFor:
    """Generators of one medium of a sample."""
    return lambda purpose: rng_for(f"{purpose} {number}")
