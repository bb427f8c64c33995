"""Reads the media of a prompt as vLLM hands them over, with our own loader, and brings audio and video to one length.

Knows vLLM's forms of media, and ours. Does not know budgets or encoders.

Where vLLM has kept the bytes of a file, as its server does with images and videos, they are decoded anew: its own
decoders take other frames, in other colours. What its renderer has not decoded at all is decoded here as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, MultiModalDataParser

from mllm.budget import MEDIA
from mllm.media import Audio, InMemoryMedium, MediaLoader, Video, audio_as_long_as_video, decode_in_memory, items_of
from mllm.processing.processor import ElasticProcessor
from mllm.vllm_plugin.items import EngineItem


@dataclass(frozen=True, eq=False)
class DecodedMedium:
    """Holds one medium as our transforms take it: an RGB image, `Audio` or `Video`."""

    medium: str
    raw: Any


Item = EngineItem | DecodedMedium | None
"""One medium of a prompt; None where its sender relies on the engine's cache."""


class ElasticItems(ModalityDataItems[Sequence[Item], Item]):
    """Lists the media of one kind."""

    def get_count(self) -> int:
        return len(self.data)

    def get(self, index: int) -> Item:
        return self.data[index]

    def get_item_for_hash(self, index: int) -> object:
        """Return all that decides what the encoder and the compressor make of an item."""
        item = self.data[index]
        if isinstance(item, EngineItem):
            return item.tensors
        raw = None if item is None else item.raw
        if isinstance(raw, Audio):
            return raw.samples, raw.sample_rate_hz
        if isinstance(raw, Video):
            return raw.frames, raw.frames_per_second
        # As an array: of an image vLLM would believe the name that its file gives itself, whatever it shows.
        return None if raw is None else np.asarray(raw)

    def get_processor_data(self) -> Mapping[str, object]:
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        return {}


class ElasticDataParser(MultiModalDataParser):
    """Parses the media of prompts for one model.

    Args:
        processor: says which media the model takes, what files may be, and how frames are taken.
    """

    def __init__(self, processor: ElasticProcessor) -> None:
        super().__init__()
        self.processor = processor
        self.loader = MediaLoader(gray=True, limits=processor.limits)

    def parse_mm_data(self, mm_data: Mapping[str, Any]) -> MultiModalDataItems:  # pyright: ignore
        """Decode what is not decoded yet.

        The only audio and the only video of a prompt are one clip, as with `meta.one_clip` of a manifest: an engine is
        not told the names of files, by which they are known elsewhere.

        Raises:
            MediaError: a file that cannot be used, or audio and video that are not equally long.
            ValueError: a medium that the model does not take, or a form that is not read.
        """
        items = {medium: [self._item(medium, one) for one in _listed(medium, data)] for medium, data in mm_data.items()}
        audios, videos = mm_data.get("audio"), mm_data.get("video")
        is_fresh = audios is not None and videos is not None and "video" not in self.processor.sampling
        if is_fresh and len(items["audio"]) == len(items["video"]) == 1:
            items["audio"] = [self._as_long(items["audio"][0], items["video"][0])]
        return MultiModalDataItems({medium: ElasticItems(values, medium) for medium, values in items.items()})

    def _item(self, medium: str, value: Any) -> Item:
        if value is None or isinstance(value, EngineItem | DecodedMedium):
            return value
        if medium not in self.processor.placeholder_ids:
            allowed = ", ".join(self.processor.placeholder_ids) or "text only"
            raise ValueError(f"this model does not take {medium}; it takes {allowed}")
        sampling = self.processor.sampling.get(medium)
        if isinstance(value, str):
            raw = self.loader(medium, value) if sampling is None else self.loader.frames(value, sampling)
        else:
            raw = decode_in_memory(InMemoryMedium(medium, value), self.loader, sampling)
        return DecodedMedium(medium, raw)

    def _as_long(self, audio: Item, video: Item) -> Item:
        if not isinstance(audio, DecodedMedium) or not isinstance(video, DecodedMedium):
            return audio
        most = self.loader.max_mismatch_seconds
        assert most is not None
        # Again of the same length where both come back from vLLM's cache of items.
        raw = audio_as_long_as_video(audio.raw, video.raw, path="audio", max_mismatch_seconds=most)
        return DecodedMedium("audio", raw)


def _listed(medium: str, data: Any) -> list[Any]:
    """List the items of what stands under one medium, each in one of our forms."""
    assert medium in MEDIA, medium
    if isinstance(data, EngineItem | DecodedMedium) or data is None:
        return [data]
    if isinstance(data, list):
        values = [_ours(value) for value in data]
        if any(value is None or isinstance(value, EngineItem | DecodedMedium) for value in values):
            return values
        return items_of(medium, values)
    return items_of(medium, _ours(data))


def _ours(value: Any) -> Any:
    """Return one item as `mllm.media.in_memory` reads it.

    Raises:
        ValueError: frames that were taken here and there from a video.
    """
    if isinstance(value, MediaWithBytes):
        return value.original_bytes
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        frames, facts = value
        if isinstance(frames, MediaWithBytes):
            return frames.original_bytes
        taken = facts.get("frames_indices")
        if (taken is not None and list(taken) != list(range(len(frames)))) or not facts.get("fps"):
            raise ValueError(
                "video holds frames that were taken from it, without their rate; give the file's bytes, or all frames "
                "as (array, frames per second)"
            )
        return frames, float(facts["fps"])
    return value
