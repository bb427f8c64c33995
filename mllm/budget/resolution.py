"""Says how a model sees an image where its processor can be asked to see less of it: the resolutions of `image<=N`.

Knows sizes and counts. Does not know processors or images; what a family of models can do is in `hosts/resizing.py`.
"""

from dataclasses import dataclass
from typing import Protocol

from mllm.budget.tiling import Size


@dataclass(frozen=True)
class Resolution:
    """Holds one way in which a host's processor sees an image.

    Args:
        setting: what its processor is called with, of one whose tiles are read as a map the most tiles; None where that
            is its own default.
        num_images: encoded images it makes, the thumbnail counted.
        tokens: soft tokens of all of them, before any is pooled.
        grid: their rows and columns, where images keep their shape.
    """

    setting: int | None
    num_images: int
    tokens: int
    grid: Size | None = None


class Resizing(Protocol):
    """Tells the resolution at which an image is seen, of its size alone."""

    def default(self, image: Size) -> Resolution:
        """Return the processor's own."""
        ...

    def at_most(self, image: Size, max_tokens: int) -> Resolution:
        """Return the first of the processor's settings, the default before all others, that keeps to so many tokens.

        Raises:
            ValueError: none does; the message names what the smallest takes.
        """
        ...
