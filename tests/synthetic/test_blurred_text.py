"""Blurred text: bags are plain means, and what lips and noise do to phones."""

import numpy as np
import pytest

from mllm.synthetic.images.scenes import Scene, SceneObject
from mllm.synthetic.pretrain import blurred_text as blur
from mllm.synthetic.speech.phones import PHONE_IDS, PHONES

SCENE = Scene(
    (SceneObject("circle", "red", "k", column=1, row=4), SceneObject("star", "blue", "m", 7, 0)), "day", "pink"
)
INDEX = {word: index for index, word in enumerate(blur.BAG_WORDS)}


def words_of(bag: np.ndarray) -> dict[str, float]:
    return {blur.BAG_WORDS[index]: round(float(bag[index]), 4) for index in np.flatnonzero(bag)}


def test_words_of_bags_are_all_different() -> None:
    assert len(set(blur.BAG_WORDS)) == len(blur.BAG_WORDS)


def test_a_patch_is_its_object_or_its_background() -> None:
    bags = blur.scene_bags(SCENE)
    assert words_of(bags[4 * 8 + 1]) == {"circle": 1, "red": 1, "k": 1, "x2": 1, "y5": 1}
    assert words_of(bags[7]) == {"star": 1, "blue": 1, "m": 1, "x8": 1, "y1": 1}
    assert words_of(bags[3 * 8]) == {"day": 0.3}
    assert words_of(bags[4 * 8]) == {"pink": 0.3, "ground": 0.15}


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8])
def test_pooled_patches_are_means_over_windows(side: int) -> None:
    bags = blur.scene_bags(SCENE)
    pooled = blur.pool_grid(bags, side)
    for row in range(side):
        for column in range(side):
            rows = range(row * 8 // side, -(-(row + 1) * 8 // side))
            columns = range(column * 8 // side, -(-(column + 1) * 8 // side))
            window = [bags[y * 8 + x] for y in rows for x in columns]
            np.testing.assert_allclose(pooled[row * side + column], sum(window) / len(window), atol=1e-6)


def test_pooled_frames_are_means_and_the_rest_is_dropped() -> None:
    frames = np.arange(22.0).reshape(11, 2)
    pooled = blur.pool_stream(frames, 4)
    np.testing.assert_array_equal(pooled, [sum(frames[0:4]) / 4, sum(frames[4:8]) / 4])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: blur.pool_grid(blur.scene_bags(SCENE), 9), "from 1 to 8, got 9"),
    (lambda: blur.pool_stream(np.zeros((3, 2)), 4), "from 1 to the 3 frames of the clip, got 4"),
])  # fmt: skip
def test_windows_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_frames_say_what_is_spoken_in_their_middle() -> None:
    frames = blur.phone_frames([5, 6, 7], np.array([0.05, 0.07, 0.2]), 50.0)
    assert frames.tolist() == [0, 0, 1, *[2] * 7]  # 0.01 0.03 | 0.05 begins the second phone | 0.07 the third


@pytest.mark.parametrize("classes", [blur.VISEMES, blur.MANNERS])
def test_every_phone_is_in_one_class(classes) -> None:
    assert sorted(phone for phones in classes for phone in phones.split()) == sorted(PHONES)


@pytest.mark.parametrize("blurring", [blur.heard_phones, blur.seen_phones])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_is_heard_or_seen_of_a_phone_sums_to_one(blurring, noise: float) -> None:
    phones = np.arange(len(PHONES)).repeat(20)
    weights = blurring(phones, noise, np.random.default_rng(0))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
    assert (weights >= 0).all()


def test_without_noise_ears_are_sure_and_lips_show_the_viseme() -> None:
    phones = np.full(50, PHONE_IDS["p"])
    heard = blur.heard_phones(phones, 0.0, np.random.default_rng(0))
    assert (heard[:, PHONE_IDS["p"]] >= 0.8).all()
    seen = blur.seen_phones(phones, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(seen[:, [PHONE_IDS[phone] for phone in "pbm"]].sum(axis=1), 1.0, atol=1e-5)
    assert (seen[:, PHONE_IDS["b"]] > 0).all()


def test_swapping_keeps_the_share_that_was_asked() -> None:
    phones = np.full(20_000, PHONE_IDS["t"])
    swapped = blur.swap_phones(phones, 0.4, np.random.default_rng(0))
    # A swap within the manner p, t, k lands on t again in one of three: 0.4 * (1 - 0.7 / 3 - 0.3 / 43) are different.
    assert np.mean(swapped != phones) == pytest.approx(0.4 * (1 - 0.7 / 3 - 0.3 / 43), abs=0.015)


def test_bags_have_one_length_whatever_they_hold() -> None:
    bags = blur.unit_bags(blur.pool_grid(blur.scene_bags(SCENE), 2))
    np.testing.assert_allclose(np.linalg.norm(bags, axis=1), blur.BAG_LENGTH, rtol=1e-5)
    np.testing.assert_array_equal(blur.degrade_bags(bags, np.random.default_rng(0), 0.0), blur.unit_bags(bags))
