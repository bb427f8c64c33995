"""Says what becomes of audio that is longer than its encoder's window: refused, or cut into windows."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LongAudio:
    """Says what becomes of audio that is longer than its encoder's window.

    Args:
        mode: `refuse` it, or `chunk` it into windows that are answered about in turn.
        window_seconds: shorter windows than the encoder's; needed where the encoder has none.
        overlap_seconds: that two neighbours have in common, at least; a sixth of the window when left out.

    Raises:
        ValueError: lengths without chunk, or that are not above 0.
    """

    mode: Literal["refuse", "chunk"] = "refuse"
    window_seconds: float | None = None
    overlap_seconds: float | None = None

    def __post_init__(self) -> None:
        for key in ("window_seconds", "overlap_seconds"):
            value = getattr(self, key)
            if value is not None and self.mode != "chunk":
                raise ValueError(f"{key} is {value}; it goes with long_audio chunk, not {self.mode}")
            if value is not None and not value > 0:
                raise ValueError(f"{key} is {value}; it must be above 0")

    def lengths(self, encoder_seconds: float | None) -> tuple[float, float]:
        """Return the seconds of a window and of an overlap.

        Args:
            encoder_seconds: the encoder's window; None where it has none.

        Raises:
            ValueError: windows that are too long for the encoder or have no length, or an overlap of more than half.
        """
        window = self.window_seconds if self.window_seconds is not None else encoder_seconds
        if window is None:
            raise ValueError(
                "long_audio chunk needs window_seconds: the encoder of this model has no window of its own"
            )
        if encoder_seconds is not None and window > encoder_seconds:
            raise ValueError(f"window_seconds is {window:g}; the encoder's window is {encoder_seconds:g} seconds")
        overlap = self.overlap_seconds if self.overlap_seconds is not None else window / 6
        if overlap > window / 2:
            raise ValueError(
                f"overlap_seconds is {overlap:g}; it must be at most half a window, {window / 2:g} seconds"
            )
        return window, overlap


@dataclass(frozen=True, kw_only=True)
class LongAudioOptions:
    """Holds the options of a command that say what becomes of audio longer than its encoder's window."""

    long_audio: Literal["refuse", "chunk"] = "refuse"
    """Refuses audio longer than its encoder's window, or cuts it into windows that overlap, whose answers are joined
    where their words meet; for speech that is transcribed."""
    window_seconds: float | None = None
    """Sets, with chunk, shorter windows than the encoder's; needed where the encoder has none."""
    overlap_seconds: float | None = None
    """Sets, with chunk, what two neighbouring windows have in common; a sixth of a window when left out."""

    def __post_init__(self) -> None:
        self.read_long_audio()  # refuses what contradicts itself before anything is loaded

    def read_long_audio(self) -> LongAudio:
        """Read the options.

        Raises:
            ValueError: see `LongAudio`.
        """
        return LongAudio(mode=self.long_audio, window_seconds=self.window_seconds, overlap_seconds=self.overlap_seconds)
