"""Defines what every encoder shares: the facts it publishes, the backbone it wraps, and how it stays frozen.

Knows no medium. Does not know compressors, budgets or the LLM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def _no_frames(num_raw: int) -> int:
    raise ValueError("an image has a grid of patches and no frames to count")


@dataclass(frozen=True)
class EncoderFacts:
    """The facts of an encoder that follow from its config alone, without weights.

    Args:
        medium: `image`, `audio` or `video`.
        hidden_size: size of one feature.
        grid: rows and columns of patches, for images; of a square one where images keep their shape.
        image_pixels: height and width of the images it reads, where it reads one size.
        frames_per_second: the rate of the features, for streams.
        num_frames: counts the feature frames of a clip of so many raw samples or frames; raises `ValueError` for a clip
            that is too short or too long, and for images.
        max_patches: most patches of an image, where images keep their shape and so each has another grid.
    """

    medium: str
    hidden_size: int
    grid: tuple[int, int] | None = None
    frames_per_second: float | None = None
    num_frames: Callable[[int], int] = _no_frames
    max_patches: int | None = None
    image_pixels: tuple[int, int] | None = None


class Encoder(nn.Module):
    """Wraps a backbone behind the contract of its medium.

    Images: `forward(values) -> features (N, T, D)`, or, where they keep their shape, `forward(values, grids)` as for
    streams. Streams: `forward(values, lengths) -> (features (N, T, D), num_frames (N,))`, where the features of a clip
    do not depend on its batch mates. `mllm.testing` checks a new encoder.

    Once frozen, `train()` leaves it in `eval()`: neither dropout nor batch statistics of a frozen encoder ever move.
    """

    hidden_size: int

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone  # a transformers model; which one, only the subclass knows
        self.frozen = False

    def train(self, mode: bool = True) -> "Encoder":
        """Switches the mode as `nn.Module.train` does, except that a frozen encoder stays in `eval()`."""
        super().train(mode and not self.frozen)
        return self

    def smallest_input(self) -> tuple[Tensor, Tensor | None]:
        """Makes the raw values (and lengths, for a stream) of the smallest input there is, on the CPU.

        It is for a process that has none of this medium in its batch, yet must take part in the collectives of the
        encoder's weights.
        """
        raise NotImplementedError


def freeze(encoder: Encoder) -> None:
    """Stops an encoder from changing: no parameter trains, and `train()` no longer leaves `eval()`."""
    encoder.requires_grad_(False)
    encoder.frozen = True
    encoder.eval()
