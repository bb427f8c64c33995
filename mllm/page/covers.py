"""Finds what the soft tokens of an image cover, with the model and the media of a running server.

Knows the service, the processor and compressors. Does not know pages or HTTP.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.budget.tiling import Size
from mllm.page.overlay import Overlay, coverage, laid_out, reads_features
from mllm.processing.processor import ElasticProcessor
from mllm.processing.token_order import shown_items
from mllm.serving.answering import AnswerRules
from mllm.serving.chat_request import ChatReader
from mllm.serving.errors import refusal_of
from mllm.serving.preparation import PromptRow
from mllm.serving.service import Service
from mllm.transforms.image_tiles import cut


@dataclass(frozen=True)
class Covered:
    """An image as its encoder sees it, (3, height, width) in 0..1, and what its soft tokens cover."""

    pixels: Tensor
    overlay: Overlay


class Covers:
    """Answers what soft tokens cover, about one image at a time.

    Args:
        chat: reads requests as the server does, so what it refuses is refused here.
        compressor: of images.
    """

    def __init__(self, service: Service, chat: ChatReader, compressor: Any) -> None:
        self._service = service
        self._chat = chat
        self._compressor = compressor

    async def of(self, body: Mapping[str, Any]) -> Covered:
        """Find what the soft tokens of a request's one image cover at its budget.

        Raises:
            RequestError: the request is refused, or the compressor does not tell.
        """
        request = await self._service.read(lambda is_left: self._chat.read(body))
        (medium,) = request.conversation.media
        if reads_features(self._compressor):
            # What queries look at depends on the image, so it has to go through the encoder: one token is written.
            job = await self._service.begin(request.conversation, AnswerRules(max_new_tokens=1))
            try:
                await job.is_done.wait()
            except asyncio.CancelledError:
                job.cancel()
                raise
            job.answers()
            row = job.runs[0].prompt
        else:
            preparer = self._service.preparer
            row = (await self._service.read(lambda is_left: preparer.prepare(request.conversation, is_left))).rows[0]
        return await self._service.read(lambda is_left: self._covered(row, medium.content, is_left))

    def _covered(self, row: PromptRow, content: bytes, is_left: Callable[[], bool]) -> Covered:
        preparer = self._service.preparer
        try:
            raw = preparer.loader.until(is_left)("image", content)
            pixels = seen_images(preparer.processor, raw, row)
            overlay = self._overlay(row, len(pixels), preparer.processor)
        except ValueError as error:
            raise refusal_of(error) from error
        return Covered(laid_out(list(pixels), overlay.spots), overlay)

    @torch.no_grad()
    def _overlay(self, row: PromptRow, num_images: int, processor: ElasticProcessor) -> Overlay:
        item, count = row.items[0], row.row.counted[0]
        grid = item.extent.grid
        assert grid is not None
        num_tokens, has_own_grid = count.each or count.tokens, item.loaded.grid is not None
        if reads_features(self._compressor):
            assert item.features is not None
            dtype = next(self._compressor.parameters()).dtype
            shown = [item.features.values[index] for index in shown_items(item.extent, count, item.loaded.tilings)]
            weights = [
                coverage(
                    self._compressor,
                    num_tokens,
                    grid,
                    features=features[: grid[0] * grid[1]].to(dtype),
                    has_own_grid=has_own_grid,
                )
                for features in shown
            ]
        else:
            weights = [coverage(self._compressor, num_tokens, grid, has_own_grid=has_own_grid)] * num_images
        return Overlay.of(torch.stack(weights), item.extent, count, processor.tiling)


def seen_images(processor: ElasticProcessor, raw: Any, row: PromptRow) -> Tensor:
    """Make of a decoded image what its encoder sees of it, (P, 3, height, width) in 0..1.

    So a crop, a margin or a changed shape shows as it is, and every patch lies where the encoder has it.
    """
    transform: Any = processor.transforms["image"]
    tiles, tile = row.row.counted[0].tiles, processor.facts["image"].image_pixels
    if tiles is not None:
        assert tile is not None
        pieces = cut(raw, [tiles], tile=tile, thumbnail=tiles.has_thumbnail, resample=transform.resample)
        return pieces.float() / 255
    loaded = processor.transform("image", raw)
    values = loaded.values
    if loaded.grid is not None:
        values = pixels_of_patches(values, loaded.grid)
    shape = (3, 1, 1)
    if getattr(transform.processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(transform.processor, key)).view(shape) for key in ("image_mean", "image_std"))
        values = values * std + mean
    return values.clamp(0, 1)[None]


def pixels_of_patches(patches: Tensor, grid: Size) -> Tensor:
    """Put an image together again that SigLIP 2's processor took apart: (h * w, p * p * 3) -> (3, h * p, w * p)."""
    side = round((patches.shape[1] / 3) ** 0.5)
    pixels_hwppc = patches.unflatten(1, (side, side, 3)).unflatten(0, grid)
    return pixels_hwppc.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
