"""Says which frames of a video are used: all of them, those of another rate, or a few that stand for the whole.

Knows times. Does not know files or pixels.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Says which frames of a file are used: for every output the number of a frame, never decreasing.

    Frames are numbered in the order in which they are shown; `num_frames` is how many the file holds. `stamps` are the
    timestamps of the frames that are used, each once, where only those are to be decoded.
    """

    num_frames: int
    indices: tuple[int, ...]
    frames_per_second: float
    stamps: tuple[int, ...] | None = None

    def of_used(self) -> "FramePlan":
        """Return the plan of the same frames, numbered among those that are used."""
        used = sorted(set(self.indices))
        new_numbers = {number: new_number for new_number, number in enumerate(used)}
        return FramePlan(len(used), tuple(new_numbers[number] for number in self.indices), self.frames_per_second)


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Says how few frames stand for a whole video.

    Args:
        count: frames, each from the middle of one of as many equal stretches of time.
        per_second: fewer than `count` where that makes more frames a second than this; always `count` when left out.
    """

    count: int
    per_second: float | None = None

    def plan(self, name: str, times: Sequence[int], span: Fraction, time_base: Fraction) -> FramePlan:
        """Plan which frames of a video are taken.

        Args:
            times: of all its frames, in units of `time_base` seconds. span: its length in seconds.

        Raises:
            ValueError: it has fewer frames than are to be taken.
        """
        count = self.count
        if self.per_second is not None:
            count = min(count, max(1, int(span * Fraction(self.per_second))))
        if len(times) < count:
            raise ValueError(f"{name}: the video has {len(times)} frames, and {count} are to be taken from it")
        indices = nearest_frames(times, count, span / count / time_base, from_middle=True)
        return FramePlan(len(times), indices, float(count / span))


def nearest_frames(times: Sequence[int], count: int, step: Fraction, *, from_middle: bool = False) -> tuple[int, ...]:
    """Number the frames nearest to as many times, the earlier one of two equally near.

    Args:
        times: of all frames; they never decrease. step: between two that are asked for, in the same units.
        from_middle: begin half a step in, so that each stands for a stretch of one step; at 0 otherwise.
    """
    # Whole numbers, since comparing fractions takes longer than decoding a small frame.
    above, below = step.numerator, 2 * step.denominator
    return tuple(_nearest_frame(times, (2 * number + from_middle) * above, below) for number in range(count))


def _nearest_frame(times: Sequence[int], above: int, below: int) -> int:
    """Return the index of the time nearest to above / below."""
    right = bisect_left(times, -(-above // below))  # the first time that is not before it
    if right == 0 or right == len(times):
        return max(right - 1, 0)
    return right - 1 if above - times[right - 1] * below <= times[right] * below - above else right
