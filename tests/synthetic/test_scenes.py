"""What the scenes, their questions and the image corpus promise."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from mllm.data.manifest import read_manifest
from mllm.synthetic.images.corpus import write_image_corpus
from mllm.synthetic.images.questions import (
    ANSWERS,
    KINDS,
    all_questions,
    describe_scene,
    one_question_per_kind,
    sample_questions,
)
from mllm.synthetic.images.scenes import COLOURS, GROUNDS, SPLITS, Scene, SceneObject, random_scenes, render_scene

CIRCLE = SceneObject("circle", "red", "k", column=1, row=4)
SQUARE = SceneObject("square", "blue", "m", column=5, row=0)
STARS = (SceneObject("star", "red", "a", column=3, row=3), SceneObject("star", "green", "t", column=7, row=7))
SCENE = Scene((CIRCLE, SQUARE, *STARS), "night", "brown")


def answers(scene: Scene) -> dict[str, str]:
    return {question.text: question.answer for question in all_questions(scene)}


def test_scenes_are_a_function_of_split_and_seed() -> None:
    assert list(islice(random_scenes("train", 3), 20)) == list(islice(random_scenes("train", 3), 20))
    assert list(islice(random_scenes("train", 3), 20)) != list(islice(random_scenes("train", 4), 20))


def test_no_scene_is_in_two_splits_whatever_the_seed() -> None:
    for split in SPLITS:
        for seed in range(3):
            assert {scene.split() for scene in islice(random_scenes(split, seed), 50)} == {split}


def test_a_scene_keeps_its_split_when_only_pixels_change() -> None:
    moved = Scene((STARS[1], SQUARE, STARS[0], CIRCLE), "night", "brown", horizon_row=5)
    nudged = Scene((SceneObject("circle", "red", "k", 1, 4, shift=(1, -1)), SQUARE, *STARS), "night", "brown")
    assert SCENE.split() == moved.split() == nudged.split()


def test_objects_stand_in_cells_of_their_own_and_two_shapes_are_unique() -> None:
    for scene in islice(random_scenes("train", 0), 300):
        assert len({(thing.column, thing.row) for thing in scene.objects}) == len(scene.objects)
        counts = Counter(thing.shape for thing in scene.objects)
        assert sum(count == 1 for count in counts.values()) >= 2


def test_answers_of_a_scene_made_by_hand() -> None:
    expected = {
        "is it day or night?": "night",
        "what colour is the ground?": "brown",
        "what colour is the circle?": "red",
        "what letter is on the square?": "m",
        "how many objects?": "four",
        "how many red objects?": "two",
        "how many orange objects?": "zero",
        "is the circle left of the square?": "yes",
        "is the square left of the circle?": "no",
        "is the square above the circle?": "yes",
        "is the circle above the square?": "no",
    }
    answered = answers(SCENE)
    assert {text: answered[text] for text in expected} == expected
    assert not any("star" in text for text in answered), "two stars: no question may say 'the star'"


def test_things_in_one_column_are_not_asked_for_left_and_right() -> None:
    above = Scene((SceneObject("circle", "red", "k", 2, 1), SceneObject("cross", "red", "k", 2, 6)), "day", "pink")
    assert not any("left of" in text for text in answers(above))


def test_every_scene_can_be_asked_every_kind_and_answers_are_words_of_the_kind() -> None:
    generator = np.random.default_rng(0)
    for scene in islice(random_scenes("test", 0), 100):
        questions = one_question_per_kind(scene, generator)
        assert [question.kind for question in questions] == list(KINDS)
        assert all(question.answer in ANSWERS[question.kind] for question in questions)


def test_a_dialogue_repeats_no_question_and_ends_when_all_are_asked() -> None:
    questions = sample_questions(SCENE, np.random.default_rng(0), 1000)
    assert len(questions) == len(set(questions)) == len(all_questions(SCENE))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sample_questions(SCENE, np.random.default_rng(0), 0)


def test_kinds_are_asked_by_their_shares_and_counts_by_their_answers() -> None:
    generator = np.random.default_rng(0)
    only = dict.fromkeys(KINDS, 0.0) | {"count": 0.5, "letter": 0.5}
    first = [sample_questions(scene, generator, 1, only)[0] for scene in islice(random_scenes("train", 2), 600)]
    assert Counter(question.kind for question in first).keys() == {"count", "letter"}
    counts = Counter(question.answer for question in first if question.kind == "count")
    assert counts["zero"] < 0.4 * counts.total()
    assert counts["two"] > 0.15 * counts.total()
    every = Counter(q.answer for scene in islice(random_scenes("train", 2), 600) for q in all_questions(scene))
    assert every["zero"] > 4 * every["two"], "while most colours of a scene are not there"


def test_yes_and_no_are_equally_frequent() -> None:
    scenes = islice(random_scenes("train", 1), 200)
    answered = Counter(q.answer for scene in scenes for q in all_questions(scene) if q.kind == "relation")
    assert answered["yes"] == answered["no"]


def test_a_description_says_everything() -> None:
    scene = Scene((CIRCLE, SQUARE), "day", "gray")
    assert describe_scene(scene) == "day, ground gray; circle red k x2 y5; square blue m x6 y1."
    assert describe_scene(scene, [1, 0]) == "day, ground gray; square blue m x6 y1; circle red k x2 y5."


def test_pixels_show_the_ground_the_objects_and_nothing_beyond_their_cells() -> None:
    empty, full = (np.asarray(render_scene(Scene(things, "night", "brown"))) for things in ((), SCENE.objects))
    assert full.shape == (128, 128, 3)
    assert tuple(empty[-1, 0]) == GROUNDS["brown"]
    changed = {(y // 16, x // 16) for y, x in np.argwhere((empty != full).any(axis=-1))}
    assert changed == {(thing.row, thing.column) for thing in SCENE.objects}
    cell = full[4 * 16 : 5 * 16, 1 * 16 : 2 * 16].reshape(-1, 3)
    assert (cell == COLOURS["red"]).all(axis=-1).sum() > 40


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'dev'; allowed: train, validation, test"):
        next(random_scenes("dev", 0))


def test_the_corpus_reads_back_as_it_was_drawn(tmp_path) -> None:
    manifests = write_image_corpus(tmp_path / "a", num_train=4, num_validation=2, num_test=3, seed=5)
    again = write_image_corpus(tmp_path / "b", num_train=4, num_validation=2, num_test=3, seed=5)
    for split, count in {"train": 4, "validation": 2 * len(KINDS), "test": 3 * len(KINDS)}.items():
        assert manifests[split].read_bytes() == again[split].read_bytes()
        samples = read_manifest(manifests[split], manifests[split].parent)
        assert len(samples) == count
        assert {sample.task for sample in samples} == {"vqa"}
        assert all(len(sample.media) == 1 for sample in samples)
    scene = next(random_scenes("test", 5))
    image = Image.open(tmp_path / "a" / samples[0].media[0].path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(render_scene(scene)))
    answered = answers(scene)
    for sample in samples[: len(KINDS)]:
        question, answer = sample.messages
        assert answered[question.text] == answer.text
        assert sample.meta["scene"] == describe_scene(scene)


def test_a_corpus_without_scenes_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="num_test must be at least 1 scene, got 0"):
        write_image_corpus(tmp_path, num_train=1, num_validation=1, num_test=0, seed=0)
