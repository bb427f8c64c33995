"""Makes what the synthetic LLM reads before it is frozen: sequences of sharp words and blurred ones, made on the fly.

Knows the tokenizer, scenes, questions, sentences and phone timings, all of one split. Does not know the model.

Kinds of sequences (`KINDS`):
    scene_text   <s> description question? answer </s> question? answer </s> ...
    scene_bags   <s> <image> bags </image> question? answer </s> ...
                 either may begin with "describe the picture." and the objects in another order </s>
    phones       <s> <audio> phone words </audio> prompt sentence </s>
    audio, video, audio_video
                 <s> <audio> bags </audio> <video> bags </video> prompt sentence </s>
    sentence     <s> sentence </s>

Looking things up appears late and suddenly in small transformers, so it is made easy first. `progress` (0 at the start
of training, 1 at its end) leads from images that consist of a handful of bags to images of 64, from clean bags to
noisy ones, and from descriptions, in which nearly every word is looked up by the word before it, to questions.

Comparing places takes two look-ups and then a comparison, and until all three are there none of them is rewarded: it
stayed at chance for 3,900 steps, and so did telling two red things from one. So an example also holds hints, words
that the middle of the model should know at a position: at a thing that is compared, where it is; at a thing that is
described or shown by itself, how many of its colour there were so far. Then comparing is learnt within 150 steps of
nothing else and counting within 400; thinly mixed with everything else both wait, hence the curriculum (`_CURRICULUM`).

Shapes: T tokens of a sequence, n bags in it, K bag words.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mllm.synthetic.images.questions import (
    NUMBERS,
    TRAINING_WEIGHTS,
    Question,
    describe_scene,
    object_words,
    sample_questions,
)
from mllm.synthetic.images.scenes import GRID_CELLS, Scene, SceneObject, random_scenes
from mllm.synthetic.pretrain import blurred_text as blur
from mllm.synthetic.prompts import DESCRIBE_PROMPT, MEDIA_MARKERS, SPEECH_PROMPTS
from mllm.synthetic.speech.phones import PHONE_IDS, PHONES
from mllm.synthetic.speech.sentences import sample_sentences
from mllm.synthetic.speech.synthesis import say
from mllm.synthetic.speech.voices import random_speaker
from mllm.synthetic.tokenizer import phone_word

KINDS = ("scene_text", "scene_bags", "phones", "audio", "video", "audio_video", "sentence")
AUDIO_FRAMES_PER_SECOND, VIDEO_FRAMES_PER_SECOND = 50.0, 25.0
AUDIO_RATES, VIDEO_RATES, GRID_SIDES = (4, 8, 16), (2, 5), (8, 4, 2, 1)
_OTHER_AUDIO_RATES, _OTHER_VIDEO_RATES, _OTHER_SIDES = (2, 5, 6, 10, 12), (1, 3, 4, 8), (3, 5, 6, 7)
_TEXT_WEIGHT, _END_WEIGHT = 0.03, 0.1
# Weights of question kinds until which part of the training is done: one hard kind after the other, each of them dense.
_CURRICULUM = (
    (0.4, {"time": 0.05, "ground": 0.08, "colour": 0.2, "letter": 0.22, "count": 0.1, "relation": 0.35}),
    (0.7, {"time": 0.01, "ground": 0.02, "colour": 0.04, "letter": 0.05, "count": 0.8, "relation": 0.08}),
    (1.0, TRAINING_WEIGHTS),
)
_ANSWER_WEIGHTS = {"count": 2.0, "relation": 2.0}  # the hardest ones


@dataclass
class Example:
    """One sequence: ids (0 where a bag stands), the bags and where they stand, and the loss weight of every token."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    bags: list[np.ndarray] = field(default_factory=list)
    bag_positions: list[int] = field(default_factory=list)
    answers: list[tuple[str, int]] = field(default_factory=list)  # (question kind, position of the answer)
    hints: list[tuple[int, int]] = field(default_factory=list)  # (position, id of a word that should be known there)

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))

    def add_bags(self, bags: np.ndarray) -> None:
        self.bag_positions.extend(range(len(self.ids), len(self.ids) + len(bags)))
        self.bags.append(bags)
        self.add([0] * len(bags), 0.0)


@dataclass(frozen=True)
class Spoken:
    """A sentence as one voice said it: phone ids and when each phone ends."""

    sentence: str
    phones: np.ndarray
    ends_seconds: np.ndarray


def speak_sentences(count: int, *, split: str, seed: int) -> list[Spoken]:
    """Synthesise `count` sentences of a split, each once by a voice of that split; only the timings are kept.

    Raises:
        ImportError: the synthesiser is not installed.
    """
    generator = np.random.default_rng([seed, 11])
    spoken = []
    for sentence in sample_sentences(count, split=split, seed=seed):
        utterance = say(sentence, random_speaker(split, generator))
        phones = np.array([PHONE_IDS[symbol] for symbol, _, _ in utterance.phones])
        spoken.append(Spoken(sentence, phones, np.array([end for _, _, end in utterance.phones])))
    return spoken


class PretrainingText:
    """Samples sequences of any kind from one split of the synthetic corpus.

    Args:
        tokenizer: the synthetic tokenizer.
        spoken: the utterances that speech sequences are made of.
        split: the split of the scenes.
        seed: of everything that is sampled.
    """

    def __init__(self, tokenizer, spoken: Sequence[Spoken], *, split: str, seed: int) -> None:
        self.tokenizer = tokenizer
        self.spoken = spoken
        self.split = split
        self.generator = np.random.default_rng([seed, 13])
        self.scenes = random_scenes(split, seed)
        self.progress = 1.0
        self.encode = lru_cache(maxsize=100_000)(self._encode)

    def sample(self, kind: str, **settings) -> Example:
        """Sample one sequence.

        Args:
            kind: one of `KINDS`.
            settings: fixes what is random otherwise: `side`, `audio_rate`, `video_rate`, `noise`, `scene`,
                `questions`.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind of sequence {kind!r}; allowed: {', '.join(KINDS)}")
        if kind.startswith("scene"):
            return self._scene(kind, **settings)
        utterance = self.spoken[int(self.generator.integers(len(self.spoken)))]
        if kind == "sentence":
            return self._begin(utterance.sentence, 0.3, end=True)
        return self.speech(utterance, ("audio", "video") if kind == "audio_video" else (kind,), **settings)

    def speech(self, utterance: Spoken, media: tuple[str, ...], **settings) -> Example:
        """Put together the media of one utterance, the prompt and the sentence.

        Args:
            utterance: what is shown.
            media: ("phones",), or some of "audio", "video".
            settings: as those of `sample`.
        """
        example = self._begin()
        shown = ("audio",) if media == ("phones",) else media
        for medium in shown:
            opening, closing = MEDIA_MARKERS[medium]
            example.add(self.encode(opening), 0.0)
            if media == ("phones",):
                example.add(self._phone_ids(utterance, settings.get("noise")), 0.0)
            else:
                example.add_bags(self._stream(utterance, medium, **settings))
            example.add(self.encode(closing), 0.0)
        example.add(self.encode(SPEECH_PROMPTS[shown]), 0.0)
        example.answers.append(("sentence", len(example.ids)))
        example.add(self.encode(utterance.sentence), 1.0)
        example.add([self.tokenizer.eos_token_id], 1.0)
        return example

    def _scene(self, kind: str, *, side=None, noise=None, questions=None, scene=None) -> Example:
        scene = scene or next(self.scenes)
        example = self._begin()
        if kind == "scene_text":
            self._add_description(example, scene)
        else:
            opening, closing = MEDIA_MARKERS["image"]
            example.add(self.encode(opening), 0.0)
            self._add_image(example, scene, side, noise)
            example.add(self.encode(closing), 0.0)
        if questions is None:
            is_described = side is None and self.generator.random() < 0.5 - 0.4 * self.progress
            if is_described:
                self._describe(example, scene)
            fewest = 4 if is_described else 10
            count = int(self.generator.integers(fewest, fewest + 6))
            weights = next(weights for end, weights in _CURRICULUM if self.progress <= end)
            questions = sample_questions(scene, self.generator, count, weights)
        self._ask(example, scene, questions)
        return example

    def _describe(self, example: Example, scene: Scene) -> None:
        """Ask for a description and give it, the objects in random order: which one is next cannot be known."""
        self._add_words(example, DESCRIBE_PROMPT, 0.0)
        for index in self.generator.permutation(len(scene.objects)):
            shape, *rest, row = object_words(scene.objects[index])
            self._add_words(example, shape, _TEXT_WEIGHT)
            self._add_words(example, " ".join(rest), 1.0)
            ids = self.encode(f"{row};")
            example.add(ids[:1], 1.0)
            example.add(ids[1:], _TEXT_WEIGHT)
        example.add([self.tokenizer.eos_token_id], _END_WEIGHT)

    def _ask(self, example: Example, scene: Scene, questions: Sequence[Question]) -> None:
        """Add questions and answers, with the cells of the things that are compared as hints."""
        things = {thing.shape: thing for thing in scene.objects}
        for question in questions:
            for word in question.text.split():
                thing = things.get(word.rstrip("?"))
                if question.kind == "relation" and thing is not None:
                    *_, column, row = (self.encode(name)[0] for name in object_words(thing))
                    example.hints += [(len(example.ids), column), (len(example.ids), row)]
                example.add(self.encode(word), 0.0)
            example.answers.append((question.kind, len(example.ids)))
            example.add(self.encode(question.answer), _ANSWER_WEIGHTS.get(question.kind, 1.0))
            example.add([self.tokenizer.eos_token_id], _END_WEIGHT)

    def _add_words(self, example: Example, text: str, weight: float) -> None:
        for word in text.split():
            example.add(self.encode(word), weight)

    def _add_description(self, example: Example, scene: Scene) -> None:
        """Add the scene in words, its objects in random order."""
        order = self.generator.permutation(len(scene.objects)).tolist()
        beginning, *parts = describe_scene(scene, order).split("; ")
        self._add_words(example, f"{beginning};", 0.0)
        positions = []
        for index, part in enumerate(parts):
            positions.append(len(example.ids) + 1)  # the colour is the second word
            self._add_words(example, part if index + 1 == len(parts) else f"{part};", 0.0)
        self._hint_counts(example, [scene.objects[index] for index in order], positions)

    def _add_image(self, example: Example, scene: Scene, side: int | None, noise: float | None) -> None:
        """Add bags of the pooled image, or, as the easiest images, of its objects and of everything, in order."""
        noise = self._noise(0.4) * min(1.0, 3.0 * self.progress) if noise is None else noise
        bags = blur.scene_bags(scene)
        start = len(example.ids)
        things = sorted(scene.objects, key=_cell)
        if side is None and self.generator.random() < 0.75 - 0.65 * self.progress:
            bags = np.concatenate([bags[[_cell(thing) for thing in things]], bags.mean(axis=0)[None]])
            self._hint_counts(example, things, [start + index for index in range(len(things))])
        else:
            side = self._pick(GRID_SIDES, _OTHER_SIDES, (0.3, 0.34, 0.22, 0.14)) if side is None else side
            bags = blur.pool_grid(bags, side)
            if side == GRID_CELLS:
                self._hint_counts(example, things, [start + _cell(thing) for thing in things])
        example.add_bags(blur.degrade_bags(bags, self.generator, noise))

    def _hint_counts(self, example: Example, things: Sequence[SceneObject], positions: Sequence[int]) -> None:
        """Hint at each of the things, in order, how many of its colour there were so far."""
        seen = Counter[str]()
        for thing, position in zip(things, positions, strict=True):
            seen[thing.colour] += 1
            example.hints.append((position, self.encode(NUMBERS[seen[thing.colour]])[0]))

    def _phone_ids(self, utterance: Spoken, noise: float | None) -> list[int]:
        noise = self._noise(0.5) if noise is None else noise
        spoken = utterance.phones[utterance.phones != 0]
        heard = blur.swap_phones(spoken, noise, self.generator)
        return [self.encode(phone_word(PHONES[phone]))[0] for phone in heard]

    def _stream(self, utterance: Spoken, medium: str, *, audio_rate=None, video_rate=None, noise=None) -> np.ndarray:
        audio = medium == "audio"
        if audio:
            rate = audio_rate or self._pick(AUDIO_RATES, _OTHER_AUDIO_RATES, (0.45, 0.33, 0.22))
            level = self._noise(0.8) if noise is None else noise
            weights = blur.heard_phones(utterance.phones, level, self.generator)
        else:
            rate = video_rate or self._pick(VIDEO_RATES, _OTHER_VIDEO_RATES, (0.6, 0.4))
            level = self._noise(0.4) if noise is None else noise
            weights = blur.seen_phones(utterance.phones, level, self.generator)
        pace = 1.0 if noise is not None else self.generator.uniform(0.85, 1.2)
        per_second = AUDIO_FRAMES_PER_SECOND if audio else VIDEO_FRAMES_PER_SECOND
        frames = weights[blur.phone_frames(utterance.phones, utterance.ends_seconds * pace, per_second)]
        frames = blur.smooth_frames(frames, self.generator.uniform(0.0, 0.5) if noise is None else 0.2)
        bags = np.zeros((len(frames) // rate, len(blur.BAG_WORDS)), np.float32)
        bags[:, : len(PHONES)] = blur.pool_stream(frames, rate)
        return blur.degrade_bags(bags, self.generator, self._noise(0.3) if noise is None else 0.0)

    def _begin(self, text: str = "", weight: float = 0.0, *, end: bool = False) -> Example:
        example = Example()
        example.add([self.tokenizer.bos_token_id], 0.0)
        self._add_words(example, text, weight)
        if end:
            example.add([self.tokenizer.eos_token_id], weight)
        return example

    def _noise(self, most: float) -> float:
        """Sample a noise level: zero three times in ten, else uniform up to `most`."""
        return 0.0 if self.generator.random() < 0.3 else float(self.generator.uniform(0.0, most))

    def _pick(self, usual: tuple[int, ...], others: tuple[int, ...], probabilities: tuple[float, ...]) -> int:
        """Sample one of the usual values by their probabilities, or, once in eight, one of the others."""
        if self.generator.random() < 0.125:
            return int(self.generator.choice(others))
        return int(self.generator.choice(usual, p=probabilities))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _cell(thing: SceneObject) -> int:
    """Compute the index of the patch that an object lies in."""
    return thing.row * GRID_CELLS + thing.column
