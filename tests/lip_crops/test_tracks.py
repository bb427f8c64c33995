"""What following promises: people keep their tracks however the detector orders them, and the asked one is chosen."""

import numpy as np
import pytest

from mllm.lip_crops.tracks import choose, face_size, follow

SHAPE = np.array([-20 - 20j, 20 - 20j, 15j])


def person(start: complex, step: complex, size: float, count: int = 40) -> list[np.ndarray]:
    return [start + step * number + size * SHAPE for number in range(count)]


LEFT, RIGHT = person(100 + 100j, 2, 1), person(400 + 90j, -1 + 1j, 1.5)


def shuffled(*people: list[np.ndarray], seed: int = 0) -> list[list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [[faces[index] for index in generator.permutation(len(faces))] for faces in zip(*people, strict=True)]


def test_people_are_followed_in_whatever_order_they_are_found() -> None:
    tracks = sorted(follow(shuffled(LEFT, RIGHT)), key=lambda track: track.x)
    assert len(tracks) == 2
    np.testing.assert_array_equal(tracks[0].points, LEFT)
    np.testing.assert_array_equal(tracks[1].points, RIGHT)
    assert tracks[1].size == pytest.approx(face_size(RIGHT[0])) == pytest.approx(1.5 * (40 + 35))


def test_a_missed_face_is_a_gap_and_not_a_new_person() -> None:
    faces = [[] if 10 <= number < 16 else visible for number, visible in enumerate(shuffled(LEFT))]
    (track,) = follow(faces)
    assert np.isnan(track.points[10:16]).all()
    assert track.coverage == pytest.approx(34 / 40)


def test_a_cut_begins_a_new_person_and_so_does_another_size() -> None:
    far = person(420 + 300j, 0, 1, 20)
    assert [track.coverage for track in follow([[face] for face in LEFT[:20] + far])] == [0.5, 0.5]
    large = person(LEFT[20].mean(), 0, 2.5, 20)
    assert len(follow([[face] for face in LEFT[:20] + large])) == 2


@pytest.mark.parametrize(
    ("face", "x"), [("largest", RIGHT), ("right", RIGHT), ("left", LEFT), ("0", LEFT), ("1", RIGHT)]
)
def test_the_asked_face_is_chosen(face: str, x: list[np.ndarray]) -> None:
    chosen, reason = choose(follow(shuffled(LEFT, RIGHT)), face, min_coverage=0.75)
    assert chosen is not None
    assert reason == ""
    np.testing.assert_array_equal(chosen.points, x)


def test_why_none_is_chosen_is_told() -> None:
    tracks = follow(shuffled(LEFT, RIGHT))
    assert choose([], "largest", min_coverage=0.5) == (None, "no face was found")
    assert choose(tracks, "2", min_coverage=0.5) == (
        None,
        "face 2 was asked for; there are 2, counted from 0 at the left",
    )
    passing = [[LEFT[number]] if number < 10 else [] for number in range(40)]
    reason = "no face is there in 50% of the frames; the longest one in 25%"
    assert choose(follow(passing), "largest", min_coverage=0.5) == (None, reason)


def test_somebody_who_passes_by_does_not_count_even_when_large() -> None:
    faces = [[face, *([person(300 + 0j, 0, 3, 1)[0]] if number < 5 else [])] for number, face in enumerate(LEFT)]
    chosen, _ = choose(follow(faces), "largest", min_coverage=0.75)
    assert chosen is not None
    np.testing.assert_array_equal(chosen.points, LEFT)
