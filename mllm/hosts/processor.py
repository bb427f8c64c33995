"""Calls a host's own processor on one medium item at a time: encoder input, and how the prompt shows the item.

Knows processors of transformers, built of plain values. Does not know conversations, budgets or batches.

A host writes an image as tags and runs of one placeholder per soft token. What stays here of a run is one placeholder
per tile, which is made into as many again as a budget gives the tile.
"""

import inspect
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoFeatureExtractor, ProcessorMixin

from mllm.budget.resolution import Resolution
from mllm.budget.tiling import Size, Tiles
from mllm.hosts.channels import PrefixTypes
from mllm.hosts.families import HostFamily, Patches, find_family, host_facts, host_tiling, placeholder_id
from mllm.hosts.maps import MapSizes, map_items
from mllm.hosts.resizing import HostResizing, TilesResizing, resizing_of
from mllm.hosts.rows import RowBreaks, without_breaks
from mllm.hosts.tekken import tekken_template
from mllm.media import Audio
from mllm.transforms.image_processors import image_processor_class, read_image_processor

_READ = {"image": ("image_processor",), "audio": ("feature_extractor", "audio_processor")}
"""The parts of processors that are used, by medium. Others may need packages, and what they read is not read here."""
_BLANK_PIXELS = 64
"""Sides of the blank image that shows what a processor makes, where images keep their shape."""


@dataclass(frozen=True)
class HostItem:
    """Holds one medium item as its host wants it.

    Args:
        values: tiles (P, 3, h, w), patches (P, D) of an image that keeps its shape, or what `mllm.hosts.clips` reads of
            a clip.
        raw_length: true length of a clip, 1 of an image.
        ids: of the prompt, the host's tags among them, with one placeholder per tile, image or clip.
        tokens: soft tokens of each of them at the full budget.
        grid: rows and columns of the soft tokens of an image that keeps its shape.
        breaks: ids that stand behind its rows, which are not among `ids`.
        tiles: of an image whose tiles are put together as one map, for which there is one placeholder.
        maps: sizes of the thumbnail and of the map, where that is pooled by itself; see `mllm.hosts.maps`. The values
            are (2, P, pixels of a tile) then.
    """

    values: Tensor
    raw_length: int
    ids: tuple[int, ...]
    tokens: int
    grid: tuple[int, int] | None = None
    breaks: RowBreaks | None = None
    tiles: Tiles | None = None
    maps: tuple[MapSizes, ...] = ()

    @property
    def num_tags(self) -> int:
        """Count the tokens of text between and around its soft tokens, at the full budget."""
        num_rows = 0 if self.breaks is None or self.grid is None else self.grid[0]
        return len(self.ids) - self.num_placeholders + num_rows

    @property
    def num_placeholders(self) -> int:
        """Count the placeholders among its ids."""
        return 1 if self.tiles is not None else self.num_images

    @property
    def num_images(self) -> int:
        """Count the encoded images it makes."""
        if self.tiles is not None:
            return self.tiles.num_images
        return len(self.values) if self.values.dim() == 4 else 1

    @property
    def num_items(self) -> int:
        """Count the encoded items it makes: a map is one."""
        return len(self.maps) or self.num_images


@dataclass(frozen=True)
class HostSize:
    """Tells what an image of one size is made into: so many encoded images of a grid each, and tags of text."""

    grid: tuple[int, int]
    num_images: int
    num_tags: int


def read_host_processor(source: str, config: Any) -> dict[str, Any]:
    """Read the processor of a host as plain values, without its tokenizer.

    Args:
        source: folder or hub name of the host.
        config: of the host.

    Raises:
        ValueError: an image processor, feature extractor or tokenizer that needs a package which is not installed.
        OSError: there is none.
    """
    family = find_family(config.model_type, reference=source)
    template = tekken_template(source) if family.is_tekken else None
    processor_class = getattr(transformers, family.processor_class)
    values, _ = processor_class.get_processor_dict(source)
    if family.medium == "image":
        part = read_image_processor(source)
    else:
        part = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
    kept = set(inspect.signature(processor_class.__init__).parameters) - set(processor_class.get_attributes())
    return {
        "preprocessor": part.to_dict(),
        "arguments": {key: value for key, value in values.items() if key in kept and key != "chat_template"},
        "chat_template": template or values.get("chat_template"),
    }


class HostProcessor:
    """Makes encoder input and prompt ids of images or clips.

    Args:
        config: of the host.
        values: of `read_host_processor`.
        tokenizer: of the host.

    Raises:
        ValueError: no chat template, or a processor that does not go with the config or the tokenizer, which a blank
            image or a silent clip shows.
    """

    def __init__(self, config: Any, values: Mapping[str, Any], tokenizer: Any) -> None:
        self.config = config
        self.family: HostFamily = find_family(config.model_type, reference="the host")
        self.medium: Literal["image", "audio"] = self.family.medium
        self.facts = host_facts(config)
        self.tiling = host_tiling(config)
        self.tokenizer = tokenizer
        self.placeholder_id = placeholder_id(config, self.medium)
        self.chat_template = self.family.template or values.get("chat_template") or tokenizer.chat_template
        if not isinstance(self.chat_template, str):
            raise ValueError(f"the processor of this {config.model_type} holds no chat template, or several")
        self._check_break()
        self.resizing = self._resizing(values)
        self._sizes: dict[Any, HostSize] = {}
        # Processors are other people's programs: what a file lacks or says otherwise fails in them as it happens to.
        # It is found out here, where no file of a user's is to blame yet.
        try:
            self.processor = _processor(self.family, values, tokenizer)
            self.media_token: str = getattr(self.processor, f"{self.medium}_token")
            self._check_values(self(self._blank()).values)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"the processor of this {config.model_type} does not go with its config or its tokenizer: {error}"
            ) from error

    def _check_break(self) -> None:
        """Refuse a tokenizer whose line break is not the token by which the decoder knows the end of a question.

        Raises:
            ValueError: naming both.
        """
        channels = self.family.channels
        if isinstance(channels, PrefixTypes):
            ids = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
            if ids != [channels.break_id]:
                raise ValueError(f"a line break is {ids} to this tokenizer, and {channels.break_id} was expected")

    def _blank(self) -> Image.Image | Audio:
        """Make an image of about one tile, or a second of silence."""
        if self.medium == "audio":
            return Audio(np.zeros(self.sample_rate_hz, dtype=np.float32), self.sample_rate_hz)
        return Image.new("RGB", self.facts.image_pixels or (_BLANK_PIXELS, _BLANK_PIXELS))

    def _check_values(self, values: Tensor) -> None:
        """Refuse values of another size than the encoder reads; those of tiles are looked at in every image.

        Raises:
            ValueError: naming both sizes.
        """
        reads = self.family.patches or self.family.clips
        if reads is None:
            return
        made, wanted = (one.shape[-reads.num_fixed :] for one in (values, reads.smallest(self.config)[0]))
        if made != wanted:
            raise ValueError(f"it makes values of size {tuple(made)}, and the encoder reads {tuple(wanted)}")

    def _resizing(self, values: Mapping[str, Any]) -> HostResizing | TilesResizing | None:
        if self.facts.grid is None:
            return None
        if self.tiling is not None:
            assert self.facts.image_pixels is not None
            return TilesResizing(self.tiling, self.facts.image_pixels, self.facts.grid)
        rows, columns = self.facts.grid
        given = {**values["preprocessor"], **values["arguments"]}
        return resizing_of(self.config.model_type, given, rows * columns)

    def __call__(self, raw: Image.Image | Audio, resolution: Resolution | None = None) -> HostItem:
        """Process one image or clip.

        Args:
            resolution: at which an image is seen, of `resizing`; the processor's own when left out.

        Raises:
            ValueError: a clip at another rate or too long, a prompt that is not one of whole tiles, or an image that is
                cut into others than its size says.
        """
        if isinstance(raw, Audio):
            return self._clip(raw)
        setting = None if resolution is None else resolution.setting
        outputs = self._called(setting, images=[raw])
        if self.family.patches is not None:
            item = self._patches(outputs, self.family.patches)
            if resolution is not None and item.grid != resolution.grid:
                raise ValueError(
                    f"the host's processor made {item.grid} soft tokens of an image of {raw.height} x {raw.width} "
                    f"pixels, and by its size there are {resolution.grid}"
                )
            return item
        values = outputs["pixel_values"]
        values = values.reshape(-1, *values.shape[-3:])
        if self.facts.image_pixels != tuple(values.shape[-2:]):
            raise ValueError(
                f"the host's processor made tiles of {tuple(values.shape[-2:])} pixels, the encoder reads "
                f"{self.facts.image_pixels}"
            )
        assert self.facts.grid is not None
        assert self.facts.image_pixels is not None
        if resolution is not None and len(values) != resolution.num_images:
            raise ValueError(
                f"the host's processor made {len(values)} tiles of an image of {raw.height} x {raw.width} pixels, and "
                f"by its size there are {resolution.num_images}"
            )
        each = self.facts.grid[0] * self.facts.grid[1]
        if self.tiling is not None:
            tiles = self.tiling.choose((raw.height, raw.width), self.facts.image_pixels, setting)
            return self._map(outputs, values, (raw.height, raw.width), tiles)
        prompt = outputs["input_ids"][0].tolist()
        if self.family.template is not None:  # what stands behind the image is the template's here
            prompt = [token for token in prompt if token == self.placeholder_id]
        ids = self._one_per_tile(prompt, each=each, num_tiles=len(values))
        return HostItem(values, 1, ids, each)

    def _map(self, outputs: Mapping[str, Any], values: Tensor, image_pixels: Size, tiles: Tiles) -> HostItem:
        """Take an image whose tiles are put together as one map out of what the host's processor gives.

        Raises:
            ValueError: other tiles, or a map of another size, than `mllm.budget.tiling` makes.
        """
        tiling, tile, grid = self.tiling, self.facts.image_pixels, self.facts.grid
        assert tiling is not None
        assert tile is not None
        assert grid is not None
        each = grid[0] * grid[1]
        if len(values) != tiles.num_images:
            raise ValueError(f"the host's processor made {len(values)} tiles, and {tiles.num_images} were expected")
        tokens = tiling.num_tokens(tiles, each, image=image_pixels, tile=tile, grid=grid)
        ids = self._one_per_tile(outputs["input_ids"][0].tolist(), each=tokens, num_tiles=1)
        maps: tuple[MapSizes, ...] = ()
        if tiling.merge == "whole_map":
            values, maps = map_items(values, tiles, tiling, image_pixels=image_pixels, grid=grid)
        return HostItem(values, 1, ids, each, tiles=tiles, maps=maps)

    def _patches(self, outputs: Mapping[str, Any], family: Patches) -> HostItem:
        """Take an image that keeps its shape out of what the host's processor gives."""
        patches, grid = family.inputs(outputs, self.config)
        ids, tokens = outputs["input_ids"][0].tolist(), grid[0] * grid[1]
        if family.has_breaks:
            ids, breaks = without_breaks(ids, self.placeholder_id, grid)
            return HostItem(patches, 1, tuple(ids), tokens, grid, breaks)
        return HostItem(patches, 1, self._one_per_tile(ids, each=tokens, num_tiles=1), tokens, grid)

    def _clip(self, raw: Audio) -> HostItem:
        clips = self.family.clips
        assert clips is not None
        if raw.sample_rate_hz != self.sample_rate_hz:
            raise ValueError(f"the host takes audio at {self.sample_rate_hz} Hz, got {raw.sample_rate_hz} Hz")
        if clips.window_seconds is not None and raw.seconds > clips.window_seconds:
            raise ValueError(
                f"the audio lasts {raw.seconds:.2f} seconds, and the host's processor would cut it at "
                f"{clips.window_seconds:g}"
            )
        if clips.outputs is None:
            outputs = self._called(None, audio=[raw.samples])
        else:
            outputs = clips.outputs(self.processor, raw.samples)
        values, length = clips.inputs(outputs)
        ids = outputs["input_ids"][0].tolist()
        tokens = ids.count(self.placeholder_id)
        if not tokens:
            raise ValueError(f"a clip of {raw.seconds:.2f} seconds is too short for the host")
        return HostItem(values, length, self._one_per_tile(ids, each=tokens, num_tiles=1), tokens)

    def _called(self, setting: int | None, **media: Any) -> Mapping[str, Any]:
        """Call the processor on one medium item, at a setting of `resizing`; at its own where that is None."""
        processor, keywords = self.processor, {}
        if setting is not None and isinstance(self.resizing, TilesResizing):
            processor = self._seeing(setting)
        elif setting is not None:
            assert isinstance(self.resizing, HostResizing)
            keywords = {"images_kwargs": self.resizing.keywords(setting)}
        return processor(text=[self.media_token], **media, **keywords, return_tensors="pt", add_special_tokens=False)

    def _seeing(self, max_tiles: int) -> Any:
        """Return the processor as it would be if its images had at most so many tiles.

        It counts placeholders by what its image processor holds, whatever that is called with.
        """
        assert isinstance(self.resizing, TilesResizing)
        processor = copy(self.processor)
        processor.image_processor = copy(self.processor.image_processor)
        processor.image_processor.image_grid_pinpoints = self.resizing.pinpoints(max_tiles)
        return processor

    def _one_per_tile(self, ids: list[int], *, each: int, num_tiles: int) -> tuple[int, ...]:
        """Keep of every `each` placeholders the last.

        Raises:
            ValueError: other than `num_tiles` times as many.
        """
        if (num_placeholders := ids.count(self.placeholder_id)) != each * num_tiles:
            raise ValueError(
                f"the host's processor wrote {num_placeholders} placeholders for {num_tiles} tiles of {each} tokens"
            )
        kept, seen = [], 0
        for token in ids:
            seen += token == self.placeholder_id
            if token != self.placeholder_id or seen % each == 0:
                kept.append(token)
        return tuple(kept)

    @property
    def sample_rate_hz(self) -> int:
        """Return the rate of audio that is taken."""
        return int(getattr(self._extractor, "sampling_rate", 16_000))

    @property
    def _extractor(self) -> Any:
        return getattr(self.processor, "feature_extractor", None) or getattr(self.processor, "audio_processor", None)

    def size_of(self, height: int, width: int) -> "HostSize":
        """Tell what an image of this size is made into, without looking at it.

        How many tiles or patches there are the image processor tells by the size alone; what the prompt then looks like
        is learned of a blank image, once for each such number.
        """
        arrangement = self._arrangement(height, width)
        if arrangement not in self._sizes:
            item = self(Image.new("RGB", (width, height)))
            grid = item.grid or self.facts.grid
            assert grid is not None
            self._sizes[arrangement] = HostSize(grid, item.num_images, item.num_tags)
        return self._sizes[arrangement]

    def _arrangement(self, height: int, width: int) -> Any:
        """Return what images that are cut alike have in common; None where all are."""
        image_processor = self.processor.image_processor
        if self.tiling is not None and self.facts.image_pixels is not None:
            return self.tiling.choose((height, width), self.facts.image_pixels)
        if (count := getattr(image_processor, "get_number_of_image_patches", None)) is not None:
            return count(height, width, {"crop_to_patches": True})
        if self.family.patches is not None and self.family.patches.grid_of is not None:
            return self.family.patches.grid_of(image_processor, self.config, height, width)
        return (height, width) if getattr(image_processor, "do_pan_and_scan", False) else None

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """Return the ids that the tokenizer puts before a prompt by itself."""
        added = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next((n for n in range(len(added)) if added[n : n + len(bare)] == bare), len(added))
        return tuple(added[:start])


class _PartsRead(ProcessorMixin):
    """Takes the parts of a processor that are there, behind a class that hands all of its parts on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{name: part for name, part in kwargs.items() if part is not None})


def with_read_parts(processor_class: Any, medium: str) -> Any:
    """Return a class of processors that does without parts that read other media, if it has any."""
    parts = [name for name in processor_class.get_attributes() if name in ("tokenizer", *_READ[medium])]
    if len(parts) == len(processor_class.get_attributes()):
        return processor_class
    members = {"get_attributes": classmethod(lambda cls: parts)}
    return type(processor_class.__name__, (processor_class, _PartsRead), members)


def _processor(family: HostFamily, values: Mapping[str, Any], tokenizer: Any) -> Any:
    whole_class: Any = getattr(transformers, family.processor_class)
    processor_class = with_read_parts(whole_class, family.medium)
    preprocessor = dict(values["preprocessor"])
    if family.medium == "image":
        part = image_processor_class(preprocessor["image_processor_type"]).from_dict(preprocessor)
    else:
        part = getattr(transformers, preprocessor["feature_extractor_type"]).from_dict(preprocessor)
    arguments: dict[str, Any] = dict.fromkeys(whole_class.get_attributes())
    for name in processor_class.get_attributes():
        arguments[name] = tokenizer if name == "tokenizer" else part
    if not family.is_tekken:  # the processors of those that are take no template
        arguments["chat_template"] = values.get("chat_template")
    return processor_class(**arguments, **values["arguments"])
