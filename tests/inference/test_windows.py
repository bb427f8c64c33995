"""Windows cover a recording, and their transcripts meet so that every word stands once."""

import itertools

import numpy as np
import pytest

from mllm.config.long_audio import LongAudio
from mllm.inference.windows import GRID_SECONDS, join_transcripts, window_times


@pytest.mark.parametrize(("window", "overlap"), [(5.0, 5 / 6), (30.0, 5.0), (1.0, 0.5), (7.3, 0.1)])
def test_windows_cover_everything_with_their_overlaps_and_none_is_too_long(window: float, overlap: float) -> None:
    for seconds in np.random.default_rng(0).uniform(0.1, 40 * window, 200):
        times = window_times(seconds, window, overlap)
        assert times[0][0] == 0
        assert times[-1][1] == pytest.approx(seconds)
        assert all(stop - start <= window + 1e-9 for start, stop in times)
        assert all(start == pytest.approx(round(start / GRID_SECONDS) * GRID_SECONDS) for start, _ in times)
        shared = [before[1] - after[0] for before, after in itertools.pairwise(times)]
        assert all(one >= overlap - GRID_SECONDS - 1e-9 for one in shared)
        assert len(times) == 1 or len(times) * (window - overlap) < seconds + window  # no more of them than are needed


def windows_of(words: list[str], rng: np.random.Generator, least: int) -> list[list[str]]:
    """The words of windows that have at least so many in common with their neighbours."""
    parts, start = [], 0
    while True:
        stop = start + int(rng.integers(2 * least + 1, 2 * least + 9))
        parts.append(words[start:stop])
        if stop >= len(words):
            return parts
        start = stop - int(rng.integers(least, 2 * least + 1))


def test_what_was_cut_with_overlaps_is_joined_to_what_it_was() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = [f"w{number}" for number in range(int(rng.integers(1, 60)))]
        parts = windows_of(words, rng, 1)
        assert join_transcripts([" ".join(part) for part in parts], 2.0) == " ".join(words)


def test_words_that_common_speech_repeats_stand_once() -> None:
    rng = np.random.default_rng(1)
    common = ["the", "a", "of", "to", "and", "cat", "dog", "ran", "sat", "blue", "red", "now"]
    wrong = 0
    for _ in range(300):
        words = [str(word) for word in rng.choice(common, int(rng.integers(20, 60)))]
        parts = windows_of(words, rng, 4)
        wrong += join_transcripts([" ".join(part) for part in parts], 2.0) != " ".join(words)
    assert wrong <= 3  # where by chance another overlap fits as well as the true one


def test_words_cut_in_two_at_the_edges_and_words_misheard_do_no_harm() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        words = [f"word{number}" for number in range(int(rng.integers(10, 60)))]
        parts = windows_of(words, rng, 4)
        for before, after in itertools.pairwise(parts):
            before[-1] = before[-1][:3]
            after[0] = after[0][-2:]
        assert join_transcripts([" ".join(part) for part in parts], 2.0) == " ".join(words)


def test_every_word_comes_from_a_window_in_its_order_and_nothing_outside_an_overlap_is_lost() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        parts = [[f"{number}.{word_number}" for word_number in range(int(rng.integers(0, 9)))] for number in range(4)]
        flat = [word for part in parts for word in part]
        assert join_transcripts([" ".join(part) for part in parts], 2.0).split() == flat


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Place blue at F two.", "at f two, now bin red"], "Place blue at F two, now bin red"),
        (["हिन्दी में बोलो", "बोलो आज"], "हिन्दी में बोलो आज"),
        (["我今天去学校", "学校里读书"], "我今天去学校里读书"),
        (["ภาษาไทย", "ไทยดี"], "ภาษาไทยดี"),
        (["", "bin", "", "bin red"], "bin red"),
        (["on the", "the mat"], "on the mat"),
        (["alpha beta", "gamma"], "alpha beta gamma"),
        ([], ""),
    ],
)
def test_case_punctuation_and_scripts_without_spaces(texts: list[str], expected: str) -> None:
    assert join_transcripts(texts, 1.0) == expected


def test_an_overlap_holds_no_more_words_than_can_be_said_in_it() -> None:
    said = " ".join(f"w{number}" for number in range(30))
    assert join_transcripts([said, said], 10.0) == said
    assert join_transcripts([said, said], 0.5).split() == [*said.split(), *said.split()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_seconds": 5}, "window_seconds is 5; it goes with long_audio chunk, not refuse"),
        ({"mode": "chunk", "overlap_seconds": 0}, "overlap_seconds is 0; it must be above 0"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongAudio(**values)


def test_windows_must_fit_the_encoder() -> None:
    assert LongAudio(mode="chunk").lengths(30.0) == (30.0, 5.0)
    assert LongAudio(mode="chunk", window_seconds=12, overlap_seconds=3).lengths(None) == (12, 3)
    with pytest.raises(ValueError, match="needs window_seconds: the encoder of this model has no window"):
        LongAudio(mode="chunk").lengths(None)
    with pytest.raises(ValueError, match="window_seconds is 40; the encoder's window is 30 seconds"):
        LongAudio(mode="chunk", window_seconds=40).lengths(30.0)
    with pytest.raises(ValueError, match=r"overlap_seconds is 3; it must be at most half a window, 2\.5 seconds"):
        LongAudio(mode="chunk", window_seconds=5, overlap_seconds=3).lengths(30.0)
