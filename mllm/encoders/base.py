"""What every encoder shares: the facts it publishes, the backbone it wraps, and being frozen for good.

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
    """What is known of an encoder from its config alone, without weights.

    Args:
        medium: `image`, `audio` or `video`.
        hidden_size: size of one feature.
        grid: rows and columns of patches, for images; where they keep their shape, those of a square one.
        image_pixels: height and width of the images it reads, where it reads one size.
        frames_per_second: the clock of the features, for streams.
        num_frames: feature frames of a clip of so many raw samples or frames; raises `ValueError` for a clip that is
            too short or too long, and for images.
        max_patches: most patches of an image, where images keep their shape and each has a grid of its own.
    """

    medium: str
    hidden_size: int
    grid: tuple[int, int] | None = None
    frames_per_second: float | None = None
    num_frames: Callable[[int], int] = _no_frames
    max_patches: int | None = None
    image_pixels: tuple[int, int] | None = None


class Encoder(nn.Module):
    """A backbone behind the contract of its medium.

    Images: `forward(values) -> features (N, T, D)`, or, where they keep their shape, `forward(values, grids)` as for
    streams. Streams: `forward(values, lengths) -> (features (N, T, D),
    num_frames (N,))`, where the features of a clip do not depend on its batch mates.

    Once frozen, `train()` leaves it in `eval()`: neither dropout nor batch statistics of a frozen tower ever move.
    """

    hidden_size: int

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone  # a transformers model; which one, only the subclass knows
        self.frozen = False

    def train(self, mode: bool = True) -> "Encoder":
        """Like `nn.Module.train`, except that a frozen encoder stays in `eval()`."""
        super().train(mode and not self.frozen)
        return self

    def smallest_input(self) -> tuple[Tensor, Tensor | None]:
        """Raw values (and lengths, for a stream) of the smallest input there is, on the CPU; what they say is nothing.

        For a process that has none of this medium in its batch, yet must take part in the collectives of its weights.
        """
        raise NotImplementedError


def freeze(encoder: Encoder) -> None:
    """Stop an encoder from changing: no parameter trains, and `train()` no longer leaves `eval()`."""
    encoder.requires_grad_(False)
    encoder.frozen = True
    encoder.eval()
