"""Makes of one medium what an engine is given for it: the input of its encoder, and how its soft tokens stand.

Knows loaded media, counts and a processor. Does not know engines, text or files.

An engine keeps and batches the media of prompts one by one. So each item says all of itself: the encoded images that
are shown, how many tokens each of them gives, and the order in which those stand in the prompt, newlines among them.

Shapes: k encoded images of an item (its tiles, its frames, or itself), n soft tokens of the item.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.budget import TokenCount
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.processor import ElasticProcessor
from mllm.processing.token_order import order_of, shown_items

FIELDS = ("values", "size", "each", "rate", "order")
"""Names of an item's tensors; `size` is left out for images of one size."""


@dataclass(frozen=True, eq=False)
class EngineItem:
    """Holds one medium of a prompt, at its budget, as tensors on the host.

    Args:
        medium: whose encoder, compressor and placeholder it uses; image, for a video of frames.
        tensors: by the names of `FIELDS`. `values` are (k, 3, h, w) of images, (P, values of a patch) of an image that
            keeps its shape, or those of a stream; `size` is its grid (2,) or its raw length (); `each` () counts the
            tokens of one encoded image, `rate` () the frames per token, 0 where a count was named; `order` (n, 2) has
            for each soft token its encoded image, -1 for the newline, and its number in that.
    """

    medium: str
    tensors: dict[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """Count its soft tokens."""
        return len(self.tensors["order"])


def engine_item(processor: ElasticProcessor, loaded: LoadedMedia, count: TokenCount) -> EngineItem:
    """Make the item of a loaded medium at a count.

    Raises:
        ValueError: an image that was loaded without the tiles it is to be shown as.
    """
    extent = processor.extent(loaded)
    tensors = {
        "values": loaded.values,
        "each": torch.tensor(count.each or count.tokens),
        "rate": torch.tensor(count.rate),
        "order": order_of(extent, count, processor.space.media[loaded.medium].tiling),
    }
    if loaded.encoder != "image":
        tensors["size"] = torch.tensor(loaded.raw_length)
    elif loaded.grid is not None:
        tensors["size"] = torch.tensor(loaded.grid)
    elif loaded.values.ndim == 4:
        tensors["values"] = loaded.values[shown_items(extent, count, loaded.tilings)]
    else:
        tensors["values"] = loaded.values[None]
    return EngineItem(loaded.encoder, tensors)


def engine_items(
    processor: ElasticProcessor, media: Sequence[LoadedMedia], counts: Sequence[TokenCount]
) -> dict[str, list[EngineItem]]:
    """Make the items of a prompt's media, in order of appearance, by the encoder they use.

    Raises:
        ValueError: as `engine_item`.
    """
    items: dict[str, list[EngineItem]] = {}
    for loaded, count in zip(media, counts, strict=True):
        item = engine_item(processor, loaded, count)
        items.setdefault(item.medium, []).append(item)
    return items
