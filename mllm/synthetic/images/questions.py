"""Makes questions about a scene, their one-word answers, and a description of the scene in words.

Knows scenes. Does not know pixels, tokens, files or who is asked.
`time` and `ground` need a glance at the whole image; `colour`, `letter` and `relation` need single objects. `count`
is in between: which colours there are, and how much of each, survives in a mean over the image.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mllm.synthetic.images.scenes import (
    COLOURS,
    GRID_CELLS,
    GROUNDS,
    LETTERS,
    MAX_OBJECTS,
    SHAPES,
    SKIES,
    Scene,
    SceneObject,
)

COARSE_KINDS = ("time", "ground")
DETAIL_KINDS = ("colour", "letter", "relation")
KINDS = (*COARSE_KINDS, "colour", "letter", "count", "relation")

# How often each kind is asked in training dialogues: the kinds that take long to learn more often.
TRAINING_WEIGHTS = {"time": 0.05, "ground": 0.07, "colour": 0.18, "letter": 0.2, "count": 0.27, "relation": 0.23}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ANSWERS = {
    "time": tuple(SKIES),
    "ground": tuple(GROUNDS),
    "colour": tuple(COLOURS),
    "letter": LETTERS,
    "count": NUMBERS[: MAX_OBJECTS + 1],
    "relation": ("yes", "no"),
}
COLUMN_WORDS = tuple(f"x{i + 1}" for i in range(GRID_CELLS))
ROW_WORDS = tuple(f"y{i + 1}" for i in range(GRID_CELLS))


@dataclass(frozen=True)
class Question:
    """One question on a scene; the answer is one word of `ANSWERS[kind]`."""

    kind: str
    text: str
    answer: str


def all_questions(scene: Scene) -> list[Question]:
    """List every question the scene can be asked; shapes that occur twice are not referred to."""
    named = _unique_shapes(scene.objects)
    return [
        Question("time", "is it day or night?", scene.time),
        Question("ground", "what colour is the ground?", scene.ground),
        *(Question("colour", f"what colour is the {thing.shape}?", thing.colour) for thing in named),
        *(Question("letter", f"what letter is on the {thing.shape}?", thing.letter) for thing in named),
        *_count_questions(scene.objects),
        *(question for one in named for other in named for question in _relation_questions(one, other)),
    ]


def sample_questions(
    scene: Scene, generator: np.random.Generator, count: int, kind_weights: Mapping[str, float] = TRAINING_WEIGHTS
) -> list[Question]:
    """Sample up to `count` different questions: first a kind by `kind_weights`, then one question of that kind.

    Raises:
        ValueError: a count below one.
    """
    if count < 1:
        raise ValueError(f"count of questions must be at least 1, got {count}")
    by_kind = _by_kind(scene, generator)
    questions: list[Question] = []
    weights = np.array([kind_weights[kind] for kind in KINDS])
    while len(questions) < count and any(by_kind.values()):
        left = weights * [bool(by_kind[kind]) for kind in KINDS]
        kind = KINDS[int(np.searchsorted(np.cumsum(left), generator.random() * left.sum(), side="right"))]
        questions.append(by_kind[kind].pop())
    return questions


def one_question_per_kind(scene: Scene, generator: np.random.Generator) -> list[Question]:
    """Sample one question of every kind that the scene can be asked, in the order of `KINDS`."""
    by_kind = _by_kind(scene, generator)
    return [by_kind[kind].pop() for kind in KINDS if by_kind[kind]]


def describe_scene(scene: Scene, order: Iterable[int] | None = None) -> str:
    """Describe the scene in words, completely: "day, ground brown; circle red k x3 y5; square blue m x1 y2."

    Args:
        order: indices of the objects in the order of the description; the scene's own order when left out.
    """
    objects = scene.objects if order is None else tuple(scene.objects[i] for i in order)
    parts = [f"{scene.time}, ground {scene.ground}", *(" ".join(object_words(thing)) for thing in objects)]
    return "; ".join(parts) + "."


def object_words(thing: SceneObject) -> tuple[str, str, str, str, str]:
    """Give shape, colour, letter, column and row of an object as words: what one patch of the image says."""
    return thing.shape, thing.colour, thing.letter, COLUMN_WORDS[thing.column], ROW_WORDS[thing.row]


def _by_kind(scene: Scene, generator: np.random.Generator) -> dict[str, list[Question]]:
    """Sort the questions of the scene by kind, each list shuffled; the last of a list is the next to ask."""
    questions = all_questions(scene)
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for index in generator.permutation(len(questions)):
        by_kind[questions[index].kind].append(questions[index])
    by_kind["count"] = _alternating(by_kind["count"], generator)
    return by_kind


def _alternating(questions: list[Question], generator: np.random.Generator) -> list[Question]:
    """Order counts so that their answers come equally often: most colours are not there, or there once."""
    by_answer: dict[str, list[Question]] = {}
    for question in questions:
        by_answer.setdefault(question.answer, []).append(question)
    ordered = []
    while by_answer:
        answer = list(by_answer)[int(generator.integers(len(by_answer)))]
        ordered.append(by_answer[answer].pop())
        if not by_answer[answer]:
            del by_answer[answer]
    return ordered[::-1]


def _unique_shapes(objects: tuple[SceneObject, ...]) -> list[SceneObject]:
    counts = Counter(thing.shape for thing in objects)
    return [thing for thing in sorted(objects, key=lambda o: SHAPES.index(o.shape)) if counts[thing.shape] == 1]


def _count_questions(objects: tuple[SceneObject, ...]) -> list[Question]:
    counts = Counter(thing.colour for thing in objects)
    coloured = [Question("count", f"how many {colour} objects?", NUMBERS[counts[colour]]) for colour in COLOURS]
    return [Question("count", "how many objects?", NUMBERS[len(objects)]), *coloured]


def _relation_questions(one: SceneObject, other: SceneObject) -> list[Question]:
    """Ask `left of` when the columns differ, `above` when the rows do; over all pairs yes comes as often as no."""
    questions = []
    if one.column != other.column:
        answer = "yes" if one.column < other.column else "no"
        questions.append(Question("relation", f"is the {one.shape} left of the {other.shape}?", answer))
    if one.row != other.row:
        answer = "yes" if one.row < other.row else "no"
        questions.append(Question("relation", f"is the {one.shape} above the {other.shape}?", answer))
    return questions
