"""Each placeholder becomes the span of its soft tokens, and counts that do not fit are refused."""

import pytest

from mllm.processing.placeholders import expand_placeholders, pad_rows

AUDIO, IMAGE = 90, 91
BOTH = frozenset({AUDIO, IMAGE})


def test_each_placeholder_becomes_its_span_and_no_target() -> None:
    ids, labels = expand_placeholders([1, AUDIO, 5, IMAGE, 6], [-100, -100, -100, -100, 6], BOTH, [3, 2])
    assert ids == [1, AUDIO, AUDIO, AUDIO, 5, IMAGE, IMAGE, 6]
    assert labels == [-100] * 7 + [6]


@pytest.mark.parametrize("counts", [[3], [3, 2, 1]])
def test_a_wrong_number_of_media_names_both_counts_and_the_sample(counts: list[int]) -> None:
    with pytest.raises(
        ValueError, match=f"sample 'a7' has 2 media placeholders in its text for {len(counts)} media items"
    ):
        expand_placeholders([1, AUDIO, IMAGE], [-100] * 3, BOTH, counts, "a7")


def test_padding_is_on_the_side_that_is_asked_for() -> None:
    assert pad_rows([[1, 2, 3], [4]], 0, left=True).tolist() == [[1, 2, 3], [0, 0, 4]]
    assert pad_rows([[1, 2, 3], [4]], 0, left=False).tolist() == [[1, 2, 3], [4, 0, 0]]
