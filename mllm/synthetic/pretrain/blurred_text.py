"""Makes blurred text: positions that hold several words at once, the way a pooled soft token holds several patches.

Knows words, scenes, phones and pooling. Does not know token ids, embeddings or models: a bag is a row of weights over
`BAG_WORDS`, and whoever reads it multiplies by the embeddings of these words.

An LLM that has only read sharp text cannot use such mixtures; one that has read blurred text can be frozen, and a small
projector finds its way into it. Lips show only the viseme of a phone and noise swaps sounds that are alike, so phones
are blurred by `VISEMES` for video and by `MANNERS` for audio.

Shapes: K words in `BAG_WORDS`, P phones, F frames, n positions.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mllm.synthetic.images.questions import COLUMN_WORDS, ROW_WORDS, object_words
from mllm.synthetic.images.scenes import COLOURS, GRID_CELLS, GROUNDS, LETTERS, SHAPES, SKIES, Scene
from mllm.synthetic.speech.phones import PHONE_IDS, PHONES

SCENE_WORDS = (*SHAPES, *COLOURS, *LETTERS, *COLUMN_WORDS, *ROW_WORDS, *SKIES, *GROUNDS, "ground")
BAG_WORDS = (*(f"_{phone}" for phone in PHONES), *SCENE_WORDS)
_INDEX = {word: index for index, word in enumerate(BAG_WORDS)}
NUM_PHONES = len(PHONES)

BACKGROUND_WEIGHT = 0.3  # of the sky or ground of a patch, against 1 for each word of an object
BAG_LENGTH = 1.5  # euclidean length of the weights of a bag, about that of two words at once

# Phones that look alike on the lips, and phones that noise makes sound alike.
VISEMES = (
    *("sil", "p b m", "f v", "th dh", "t d n s z l", "k g ng hh", "ch jh sh zh", "r w", "y iy ih", "ey eh", "ae ay aw"),
    *("aa oh ao", "ow uh uw oy", "ah ax er axr"),
)
MANNERS = (
    *("sil", "p t k", "b d g", "m n ng", "f th s sh hh ch", "v dh z zh jh", "l r w y", "iy ih ey", "eh ae ah ay"),
    *("aa oh ao aw", "ow uh uw oy", "ax er axr"),
)


def scene_bags(scene: Scene) -> np.ndarray:
    """Make the bag of every patch of an image, (64, K) in raster order: an object's five words, or sky or ground."""
    bags = np.zeros((GRID_CELLS**2, len(BAG_WORDS)), np.float32)
    horizon = scene.horizon_row * GRID_CELLS
    bags[:horizon, _INDEX[scene.time]] = BACKGROUND_WEIGHT
    bags[horizon:, _INDEX[scene.ground]] = BACKGROUND_WEIGHT
    bags[horizon:, _INDEX["ground"]] = 0.5 * BACKGROUND_WEIGHT
    for thing in scene.objects:
        bag = bags[thing.row * GRID_CELLS + thing.column]
        bag[:] = 0.0
        bag[[_INDEX[word] for word in object_words(thing)]] = 1.0
    return bags


def pool_grid(bags: np.ndarray, side: int) -> np.ndarray:
    """Average the (64, K) bags of an image over side x side windows, (side * side, K).

    Windows are those of adaptive average pooling: window i reaches from floor(8 i / side) to ceil(8 (i + 1) / side).

    Raises:
        ValueError: a side outside 1..8.
    """
    if not 1 <= side <= GRID_CELLS:
        raise ValueError(f"side of the pooled grid must be from 1 to {GRID_CELLS}, got {side}")
    along = _area_windows(side)
    grid = bags.reshape(GRID_CELLS, GRID_CELLS, -1)
    return np.einsum("ai,bj,ijk->abk", along, along, grid, optimize=True).reshape(side * side, -1)


def pool_stream(frames: np.ndarray, rate: int) -> np.ndarray:
    """Average every `rate` consecutive frames, (F // rate, K); the remainder is dropped.

    Raises:
        ValueError: a rate below one, or fewer frames than one window.
    """
    if not 1 <= rate <= len(frames):
        raise ValueError(f"rate must be from 1 to the {len(frames)} frames of the clip, got {rate}")
    windows = len(frames) // rate
    return frames[: windows * rate].reshape(windows, rate, -1).mean(axis=1)


def phone_frames(phones: Sequence[int] | np.ndarray, ends_seconds: np.ndarray, frames_per_second: float) -> np.ndarray:
    """Look up the index into `phones` of the phone spoken in the middle of every frame, (F,)."""
    num_frames = int(ends_seconds[-1] * frames_per_second)
    middles = (np.arange(num_frames) + 0.5) / frames_per_second
    return np.minimum(np.searchsorted(ends_seconds, middles, side="right"), len(phones) - 1)


def heard_phones(phones: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Make what an ear hears of each phone: weights (len(phones), P), rows sum to one.

    With probability `noise` a phone is lost: it is swapped for another, mostly one of its manner, or smeared over its
    manner or over everything. The rest keep at least 80 % of their weight.
    """
    # `away` is the weight a phone loses; where it goes (`smear`) is thrown for each phone by itself.
    weights = np.zeros((len(phones), NUM_PHONES), np.float32)
    rows = np.arange(len(phones))
    lost = generator.random(len(phones)) < noise
    away = np.where(lost, generator.uniform(0.5, 1.0, len(phones)), generator.uniform(0.0, 0.2, len(phones)))
    alike = class_means(MANNERS)[phones]
    how = generator.random(len(phones))[:, None]
    swapped = np.eye(NUM_PHONES, dtype=np.float32)[_swap(phones, generator)]
    smear = np.where(how < 0.5, swapped, np.where(how < 0.85, alike, 1.0 / NUM_PHONES))
    weights[rows, phones] = 1.0 - away
    return weights + away[:, None].astype(np.float32) * smear


def seen_phones(phones: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Make what an eye sees of each phone: weights (len(phones), P) over its viseme; with `noise` over another one."""
    misread = generator.random(len(phones)) < noise
    shown = np.where(misread, generator.integers(NUM_PHONES, size=len(phones)), phones)
    certainty = generator.uniform(0.0, 0.6, len(phones)).astype(np.float32)[:, None]
    return certainty * np.eye(NUM_PHONES, dtype=np.float32)[shown] + (1.0 - certainty) * class_means(VISEMES)[shown]


def swap_phones(phones: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Swap each phone for another with probability `noise`, (len(phones),)."""
    return np.where(generator.random(len(phones)) < noise, _swap(phones, generator), phones)


def smooth_frames(frames: np.ndarray, spread: float) -> np.ndarray:
    """Mix every frame with its neighbours: articulation and receptive fields reach over the borders of phones."""
    padded = np.pad(frames, ((1, 1), (0, 0)), mode="edge")
    return (1.0 - spread) * frames + spread * 0.5 * (padded[:-2] + padded[2:])


def degrade_bags(bags: np.ndarray, generator: np.random.Generator, noise: float) -> np.ndarray:
    """Degrade bags as an untidy projector would: other lengths, leaks between positions, and noise on every word."""
    leak = noise * generator.random()
    bags = (1.0 - leak) * bags + leak * bags.mean(axis=0)
    bags = unit_bags(bags) * np.exp(0.5 * noise * generator.standard_normal()).astype(np.float32)
    return bags + noise * generator.random() * 0.3 * generator.standard_normal(bags.shape).astype(np.float32)


def unit_bags(bags: np.ndarray) -> np.ndarray:
    """Scale bags to the euclidean length `BAG_LENGTH`, so that a mean of many words is as loud as a few words."""
    return BAG_LENGTH * bags / np.maximum(np.linalg.norm(bags, axis=1, keepdims=True), 1e-6)


@lru_cache(maxsize=8)
def class_means(classes: tuple[str, ...]) -> np.ndarray:
    """Make the matrix (P, P) whose row p is uniform over the phones in the class of p."""
    means = np.zeros((NUM_PHONES, NUM_PHONES), np.float32)
    for alike in classes:
        ids = [PHONE_IDS[phone] for phone in alike.split()]
        means[np.ix_(ids, ids)] = 1.0 / len(ids)
    return means


def _swap(phones: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Choose another phone for each: seven times in ten one of the same manner, else any."""
    # Inverse transform sampling for all phones at once: the first member whose cumulative weight passes a uniform.
    cumulative = np.cumsum(class_means(MANNERS)[phones], axis=1)
    alike = (cumulative < generator.random((len(phones), 1))).sum(axis=1)
    anything = generator.integers(NUM_PHONES, size=len(phones))
    return np.minimum(np.where(generator.random(len(phones)) < 0.7, alike, anything), NUM_PHONES - 1)


@lru_cache(maxsize=GRID_CELLS)
def _area_windows(side: int) -> np.ndarray:
    windows = np.zeros((side, GRID_CELLS), np.float32)
    for i in range(side):
        first, last = i * GRID_CELLS // side, -(-(i + 1) * GRID_CELLS // side)
        windows[i, first:last] = 1.0 / (last - first)
    return windows
