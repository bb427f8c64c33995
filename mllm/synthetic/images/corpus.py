"""Writes the image corpus: scenes as png files, and manifests that ask about them.

Knows scenes, questions and the manifest format. Does not know tokens, models or budgets.

    out/train.jsonl       one row per image, a dialogue of several questions
    out/captions.jsonl    one row per image of train, which is described in words
    out/validation.jsonl  one row per question, one question of every kind per image; `kind` says which
    out/test.jsonl        the same
    out/images/<split>/<number>.png

Scenes are parted by a digest of what they show (`Scene.split`), so the splits of all seeds are disjoint.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.synthetic.images.questions import Question, describe_scene, one_question_per_kind, sample_questions
from mllm.synthetic.images.scenes import SPLITS, Scene, random_scenes, render_scene
from mllm.synthetic.prompts import DESCRIBE_PROMPT

TASK = "vqa"


def write_image_corpus(
    out: str | Path,
    *,
    num_train: int = 2500,
    num_validation: int = 100,
    num_test: int = 300,
    seed: int = 0,
    questions_per_scene: int = 8,
) -> dict[str, Path]:
    """Write png files and one manifest per split; the same arguments give the same bytes.

    Args:
        out: folder to write into, which is also the root of the manifests.
        num_train, num_validation, num_test: scenes per split.
        seed: which scenes of each split, and what is asked.
        questions_per_scene: turns of a training dialogue.

    Returns:
        the manifest of every split, and that of the captions.

    Raises:
        ValueError: no scene in a split, or less than one question per scene.
    """
    out = Path(out)
    counts = dict(zip(SPLITS, (num_train, num_validation, num_test), strict=True))
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"num_{split} must be at least 1 scene, got {count}")
    manifests = {}
    for split, count in counts.items():
        scenes = list(islice(random_scenes(split, seed), count))
        paths = _write_images(scenes, out, split)
        generator = np.random.default_rng([seed, SPLITS.index(split), 17])
        manifests[split] = out / f"{split}.jsonl"
        num_turns = questions_per_scene if split == "train" else None
        if split == "train":
            manifests["captions"] = out / "captions.jsonl"
            write_manifest(manifests["captions"], _captions(scenes, paths))
        write_manifest(manifests[split], _samples(scenes, paths, split, generator, num_turns))
    return manifests


def _write_images(scenes: Sequence[Scene], out: Path, split: str) -> list[str]:
    folder = Path("images") / split
    (out / folder).mkdir(parents=True, exist_ok=True)
    paths = [(folder / f"{number:05d}.png").as_posix() for number in range(len(scenes))]
    for scene, path in zip(scenes, paths, strict=True):
        render_scene(scene).save(out / path, compress_level=3)
    return paths


def _samples(
    scenes: Sequence[Scene], paths: Sequence[str], split: str, generator: np.random.Generator, num_turns: int | None
) -> Iterator[Sample]:
    """Yield one dialogue per scene where `num_turns` is set, else one sample per question kind."""
    for number, (scene, path) in enumerate(zip(scenes, paths, strict=True)):
        name = f"scene-{split}-{number:05d}"
        meta = {"scene": describe_scene(scene)}
        if num_turns is not None:
            questions = sample_questions(scene, generator, num_turns)
            yield Sample(name, _dialogue(path, questions), TASK, meta=meta)
            continue
        for question in one_question_per_kind(scene, generator):
            yield Sample(f"{name}-{question.kind}", _dialogue(path, [question]), TASK, kind=question.kind, meta=meta)


def _captions(scenes: Sequence[Scene], paths: Sequence[str]) -> Iterator[Sample]:
    for number, (scene, path) in enumerate(zip(scenes, paths, strict=True)):
        caption = Question("caption", DESCRIBE_PROMPT, describe_scene(scene))
        yield Sample(f"caption-{number:05d}", _dialogue(path, [caption]), "caption")


def _dialogue(path: str, questions: Sequence[Question]) -> tuple[Message, ...]:
    messages = []
    for turn, question in enumerate(questions):
        image = (Media("image", path),) if turn == 0 else ()
        messages.append(Message("user", (*image, Text(question.text))))
        messages.append(Message("assistant", (Text(question.answer),)))
    return tuple(messages)
