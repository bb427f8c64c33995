"""Cuts a long recording into overlapping windows, and joins their transcripts so that no word stands twice.

Knows seconds and words. Does not know media or models.
"""

import math
import unicodedata
from collections.abc import Sequence

GRID_SECONDS = 0.04
"""Windows begin on this grid, that of video frames at 25 per second, so that audio and video are cut alike."""
WORDS_PER_SECOND = 8
"""Faster than anybody talks: an overlap cannot hold more words (or characters where a script has no spaces)."""
_MATCH, _OTHER, _GAP = 2, -1, -1
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0x20000, 0x2FFFF),
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, whose words are not parted by spaces."""


def window_times(seconds: float, window: float, overlap: float) -> list[tuple[float, float]]:
    """Lists start and stop, in seconds, of the fewest equally long windows that cover a recording with such overlaps.

    Windows are spread evenly, so that the last is no shorter than the others; one that holds everything is the only
    one. Starts lie on a grid of 0.04 seconds, so an overlap may be shorter by that.
    """
    if seconds <= window:
        return [(0.0, seconds)]
    count = math.ceil((seconds - overlap) / (window - overlap) - 1e-9)
    step = (seconds - window) / (count - 1)
    # The last start is rounded up: a window may be shorter by what that takes, and must not be longer.
    starts = [round(number * step / GRID_SECONDS) * GRID_SECONDS for number in range(count - 1)]
    starts.append(math.ceil((seconds - window) / GRID_SECONDS - 1e-6) * GRID_SECONDS)
    return [(start, min(start + window, seconds)) for start in starts]


def join_transcripts(texts: Sequence[str], overlap_seconds: float) -> str:
    """Joins what is said in windows that overlap, each word of an overlap once.

    The end of one text is aligned with the beginning of the next: equal words count for it, others and gaps against it,
    so that a word that was cut in two at the edge of a window does no harm. The texts are joined at the equal word
    nearest the middle of the aligned part, since either hears best what is far from its edges. Case and punctuation do
    not matter for what is equal. Where nothing is equal, one text follows the other.

    Args:
        texts: of the windows, in order.
        overlap_seconds: the longest overlap of two of them, which bounds how many words may be in it.
    """
    most = math.ceil(overlap_seconds * WORDS_PER_SECOND) + 2
    joined: list[str] = []
    for text in texts:
        words = _words(text)
        seam = _seam(joined[-most:], words[:most])
        if seam is not None:
            kept, dropped = seam
            joined = joined[: len(joined) - len(joined[-most:]) + kept]
            words = words[dropped:]
        if words and joined and not words[0][0].isspace() and not _is_unspaced(words[0][0]):
            words[0] = f" {words[0]}"
        joined += words
    return "".join(joined).strip()


def _words(text: str) -> list[str]:
    """Splits a text into words, or characters of scripts without spaces, each with the spaces before it."""
    words: list[str] = []
    spaces, is_open = "", False  # whether the last word takes further letters
    for letter in text.strip():
        is_mark = unicodedata.category(letter).startswith("M")
        if letter.isspace():
            spaces += letter
        elif words and not spaces and (is_mark or (is_open and not _is_unspaced(letter))):
            words[-1] += letter
        else:
            words.append(f"{spaces}{letter}")
            spaces, is_open = "", not _is_unspaced(letter)
    return words


def _is_unspaced(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in _UNSPACED)


def _key(word: str) -> str:
    """Reduces a word to what is compared: letters, marks and numbers, whatever their case."""
    bare = "".join(letter for letter in word.strip().casefold() if unicodedata.category(letter)[0] in "LMN")
    return unicodedata.normalize("NFC", bare) or word.strip()


def _seam(tail: Sequence[str], head: Sequence[str]) -> tuple[int, int] | None:
    """Counts the words of the tail that are kept and those of the head that are left out; None without common words."""
    ends, begins = [_key(word) for word in tail], [_key(word) for word in head]
    # best[i][j]: the best alignment of words of the tail that end at i with the first j of the head. The tail may begin
    # anywhere at no cost; what it ends with, and what the head begins with, has to be aligned or paid for.
    best = [[_GAP * j for j in range(len(begins) + 1)]]
    steps: list[list[str]] = [["left"] * (len(begins) + 1)]
    for i, end in enumerate(ends, start=1):
        best.append([0])
        steps.append(["start"])
        for j, begin in enumerate(begins, start=1):
            options = {
                "both": best[i - 1][j - 1] + (_MATCH if end == begin else _OTHER),
                "up": best[i - 1][j] + _GAP,
                "left": best[i][j - 1] + _GAP,
            }
            step = max(options, key=lambda name: options[name])
            best[i].append(options[step])
            steps[i].append(step)
    stop = max(range(len(begins) + 1), key=lambda j: best[-1][j])
    if best[-1][stop] <= 0:
        return None
    # Walk back along the best alignment, and remember where its equal words stand.
    pairs, i, j = [], len(ends), stop
    while j > 0:
        step = steps[i][j]
        pairs.append((i, j) if step == "both" and ends[i - 1] == begins[j - 1] else None)
        i, j = i - (step in ("both", "up")), j - (step in ("both", "left"))
    middle = (len(pairs) - 1) / 2
    equal = [(abs(number - middle), pair) for number, pair in enumerate(pairs) if pair is not None]
    return min(equal)[1]
