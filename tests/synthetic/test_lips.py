"""What the lips promise: frames that last as long as the audio, one film per call, mouths that do what phones do."""

import numpy as np
import pytest

from mllm.synthetic.speech.lips import LIP_FRAMES_PER_SECOND, draw_lips, num_lip_frames
from mllm.synthetic.speech.synthesis import Utterance, synthesise
from mllm.synthetic.speech.voices import VOICES


@pytest.fixture(scope="module")
def utterance() -> Utterance:
    return synthesise("we moved the empty basket", VOICES["train"][0])


def test_images_last_as_long_as_the_audio(utterance: Utterance) -> None:
    frames = draw_lips(utterance.phones, face_seed=1)
    assert frames.dtype == np.uint8
    assert frames.shape == (num_lip_frames(utterance.seconds), 48, 48)
    assert abs(len(frames) / LIP_FRAMES_PER_SECOND - utterance.seconds) <= 0.5 / LIP_FRAMES_PER_SECOND


def test_frames_are_a_function_of_phones_and_face(utterance: Utterance) -> None:
    frames = draw_lips(utterance.phones, face_seed=1)
    assert np.array_equal(frames, draw_lips(utterance.phones, face_seed=1))
    assert not np.array_equal(frames, draw_lips(utterance.phones, face_seed=2))
    other = [(symbol if symbol != "m" else "s", start, end) for symbol, start, end in utterance.phones]
    assert not np.array_equal(frames, draw_lips(other, face_seed=1))


def test_gray_is_the_luminance_of_the_colours(utterance: Utterance) -> None:
    gray = draw_lips(utterance.phones, face_seed=3, size=96).astype(float)
    rgb = draw_lips(utterance.phones, face_seed=3, size=96, color=True)
    assert rgb.shape == (*gray.shape, 3)
    assert np.abs(rgb @ [0.299, 0.587, 0.114] - gray).max() < 3


@pytest.mark.parametrize("face_seed", range(4))
def test_mouths_close_for_b_and_open_for_aa(face_seed: int) -> None:
    phones = [("sil", 0.0, 0.2), ("b", 0.2, 0.6), ("aa", 0.6, 1.0), ("sil", 1.0, 1.2)]
    frames = draw_lips(phones, face_seed=face_seed).astype(float)
    darkest_tenth = np.sort(frames.reshape(len(frames), -1), axis=1)[:, : 48 * 48 // 10].mean(axis=1)
    closed, opened = darkest_tenth[8:12].mean(), darkest_tenth[19:22].mean()
    assert opened < 0.8 * closed, "an open mouth shows the dark inside"


@pytest.mark.parametrize(
    ("phones", "size", "message"),
    [
        ([], 48, "phones to draw are empty"),
        ([("xx", 0.0, 1.0)], 48, "no mouth shape for xx"),
        ([("aa", 0.0, 1.0)], 8, "at least 16 pixels, got 8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(phones: list, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_lips(phones, face_seed=0, size=size)
