"""Draws moving lips for spoken phones: phone timings and a face seed in, images out.

Knows how mouths move and how to draw one. Does not know audio, sentences, files or models.

    frames = draw_lips(utterance.phones, face_seed=speaker.face_seed)                 uint8 (T, 48, 48), gray, 25 fps
    frames = draw_lips(utterance.phones, face_seed=..., size=96, color=True)          uint8 (T, 96, 96, 3)

The frames are a function of the phones and the face seed. T is `num_lip_frames(seconds)`, the audio's length rounded to
whole frames. Lips are ambiguous on purpose: phones share mouth shapes, neighbours blend over about 100 ms, every phone
falls short of its shape by a random part and jitters; crisp shapes would be read almost without error.

Shapes: T frames, H x W pixels, 6 mouth parameters.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm.synthetic.speech.synthesis import Phone

LIP_FRAMES_PER_SECOND = 25
_TRACK_HZ = 200  # the mouth's movement is computed this finely before it is sampled at the frames
_BLEND_SECONDS = 0.11
_GREATEST_UNDERSHOOT = 0.35
_JITTER = 0.07
_REST = (0.04, 0.50, 0.10, 0.0, 0.0, 0.0)

# open, width, round, teeth, tongue, tuck (lower lip under the upper teeth), each 0 to 1.
_SHAPES: dict[str, tuple[float, ...]] = {
    "sil": _REST,
    **dict.fromkeys(("p", "b", "m"), (0.0, 0.45, 0.15, 0.0, 0.0, 0.0)),
    **dict.fromkeys(("f", "v"), (0.12, 0.52, 0.10, 0.7, 0.0, 1.0)),
    **dict.fromkeys(("th", "dh"), (0.26, 0.50, 0.10, 0.5, 1.0, 0.0)),
    **dict.fromkeys(("t", "d", "n"), (0.28, 0.54, 0.10, 0.55, 0.45, 0.0)),
    "l": (0.36, 0.52, 0.10, 0.45, 0.80, 0.0),
    **dict.fromkeys(("s", "z"), (0.16, 0.62, 0.05, 1.0, 0.0, 0.0)),
    **dict.fromkeys(("sh", "zh", "ch", "jh"), (0.28, 0.32, 0.65, 0.85, 0.0, 0.0)),
    **dict.fromkeys(("k", "g", "ng", "hh"), (0.40, 0.50, 0.12, 0.25, 0.15, 0.0)),
    "r": (0.26, 0.36, 0.55, 0.35, 0.15, 0.0),
    "w": (0.12, 0.12, 1.00, 0.0, 0.0, 0.0),
    "y": (0.22, 0.72, 0.05, 0.50, 0.20, 0.0),
    "iy": (0.24, 0.92, 0.00, 0.65, 0.10, 0.0),
    "ih": (0.36, 0.70, 0.05, 0.45, 0.10, 0.0),
    "eh": (0.55, 0.66, 0.05, 0.40, 0.10, 0.0),
    "ae": (0.74, 0.76, 0.00, 0.40, 0.10, 0.0),
    "aa": (0.92, 0.50, 0.10, 0.25, 0.10, 0.0),
    "oh": (0.72, 0.36, 0.45, 0.15, 0.05, 0.0),
    "ao": (0.64, 0.24, 0.72, 0.05, 0.05, 0.0),
    "uh": (0.36, 0.30, 0.60, 0.20, 0.0, 0.0),
    "uw": (0.18, 0.12, 0.95, 0.0, 0.0, 0.0),
    "ah": (0.60, 0.52, 0.12, 0.30, 0.10, 0.0),
    "er": (0.40, 0.40, 0.42, 0.35, 0.10, 0.0),
    "ax": (0.36, 0.50, 0.12, 0.35, 0.10, 0.0),
    "axr": (0.36, 0.42, 0.38, 0.35, 0.10, 0.0),
}
_DIPHTHONGS = {"ey": ("eh", "iy"), "ay": ("aa", "iy"), "ow": ("ao", "uw"), "aw": ("aa", "uw"), "oy": ("ao", "iy")}


@dataclass(frozen=True)
class _Face:
    """Says what a speaker's mouth region looks like; lengths are in half image widths, colours are RGB 0 to 255."""

    centre: np.ndarray
    cos: float
    sin: float
    zoom: float
    half_width: float
    opening: float
    upper_lip: float
    lower_lip: float
    bow: float
    skin: np.ndarray
    lip: np.ndarray
    tongue: np.ndarray
    teeth: np.ndarray
    shade: np.ndarray  # left-right and top-bottom light
    moustache: float
    gain: float
    texture_seed: int


def num_lip_frames(seconds: float) -> int:
    """Count the images that go with audio of this length: within half a frame (20 ms) of it."""
    return max(1, round(seconds * LIP_FRAMES_PER_SECOND))


def draw_lips(phones: Sequence[Phone], *, face_seed: int, size: int = 48, color: bool = False) -> np.ndarray:
    """Draw images of a mouth that speaks.

    Args:
        phones: (symbol, start_seconds, end_seconds) of the whole utterance.
        face_seed: whose mouth it is; any integer that is not negative.
        size: H = W in pixels, at least 16.
        color: RGB instead of gray; the gray image is the luminance of the RGB one.

    Returns:
        uint8 (T, size, size) or (T, size, size, 3), at 25 frames per second.

    Raises:
        ValueError: no phones, a phone out of the inventory, or a size too small to show a mouth.
    """
    if not phones:
        raise ValueError("phones to draw are empty")
    unknown = sorted({symbol for symbol, _, _ in phones} - {*_SHAPES, *_DIPHTHONGS})
    if unknown:
        raise ValueError(f"no mouth shape for {', '.join(unknown)}; known are {', '.join([*_SHAPES, *_DIPHTHONGS])}")
    if size < 16:
        raise ValueError(f"size of lip images must be at least 16 pixels, got {size}")
    key = repr([(symbol, round(start, 6)) for symbol, start, _ in phones])
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    mouth = _move(phones, np.random.default_rng([face_seed, digest]))
    return _draw(mouth, _make_face(face_seed), size=size, color=color)


def _move(phones: Sequence[Phone], generator: np.random.Generator) -> np.ndarray:
    """Compute the mouth parameters of every frame (T, 6)."""
    seconds = phones[-1][2]
    # A step function of mouth shapes, one step per phone (two per diphthong), is what the face aims at.
    targets, ends = [], []
    for symbol, start, end in phones:
        parts = _DIPHTHONGS.get(symbol, (symbol,))
        for index, part in enumerate(parts, start=1):
            shape = np.array(_SHAPES[part])
            undershoot = generator.uniform(0, _GREATEST_UNDERSHOOT)
            targets.append(shape + undershoot * (np.array(_REST) - shape) + generator.normal(0, _JITTER, 6))
            ends.append(start + (end - start) * index / len(parts))
    ticks = (np.arange(int(np.ceil(seconds * _TRACK_HZ)) + 1) + 0.5) / _TRACK_HZ
    track = np.array(targets)[np.minimum(np.searchsorted(ends, ticks, side="right"), len(targets) - 1)]
    # Smoothing it lets neighbours blend, as tongues and jaws cannot jump.
    window = np.hanning(2 * round(_BLEND_SECONDS * _TRACK_HZ / 2) + 3)[1:-1]
    window /= window.sum()
    padded = np.pad(track, ((len(window) // 2,) * 2, (0, 0)), mode="edge")
    smooth = np.stack([np.convolve(channel, window, mode="valid") for channel in padded.T], axis=1)
    middles = (np.arange(num_lip_frames(seconds)) + 0.5) / LIP_FRAMES_PER_SECOND
    return np.clip(smooth[np.minimum((middles * _TRACK_HZ).astype(int), len(smooth) - 1)], 0.0, 1.0)


def _make_face(face_seed: int) -> _Face:
    generator = np.random.default_rng([face_seed, 1])
    angle = generator.normal(0, 0.05)
    tone = generator.uniform(0.35, 1.0)  # of the skin, dark to light
    skin = np.array([232, 190, 165]) * tone + generator.normal(0, 5, 3)
    redness = generator.uniform(0.62, 0.82)
    return _Face(
        centre=generator.normal(0, 0.05, 2),
        cos=float(np.cos(angle)),
        sin=float(np.sin(angle)),
        zoom=float(generator.uniform(0.88, 1.12)),
        half_width=float(generator.uniform(0.50, 0.60)),
        opening=float(generator.uniform(0.36, 0.46)),
        upper_lip=float(generator.uniform(0.08, 0.14)),
        lower_lip=float(generator.uniform(0.11, 0.18)),
        bow=float(generator.uniform(0.0, 0.35)),
        skin=skin,
        lip=skin * np.array([0.92, redness * 0.78, redness * 0.82]),
        tongue=np.array([170, 85, 90]) * (0.6 + 0.4 * tone),
        teeth=np.array([225, 220, 205]) * generator.uniform(0.85, 1.0),
        shade=generator.normal(0, 0.08, 2),
        moustache=float(generator.uniform(0.2, 0.5) if generator.random() < 0.2 else 0.0),
        gain=float(generator.uniform(0.85, 1.1)),
        texture_seed=int(generator.integers(2**31)),
    )


def _draw(mouth: np.ndarray, face: _Face, *, size: int, color: bool) -> np.ndarray:
    """Draw layers from the skin inwards, each a soft mask (T, H, W) over those before it."""
    x, y = _face_grid(face, size)  # (H, W)
    opening, width, rounding, teeth, tongue, tuck = (column[:, None, None].astype(np.float32) for column in mouth.T)
    half_width = face.half_width * (0.80 + 0.40 * width - 0.34 * rounding)
    across = x / half_width
    arch = np.clip(1 - across * across, 0, 1)
    root = np.sqrt(arch)  # 1 in the middle of the mouth, 0 at its corners
    half_open = face.opening * opening
    plump = 1 + 0.5 * rounding
    inner_top = -0.65 * half_open * root
    inner_bottom = 1.25 * half_open * root - 0.5 * face.lower_lip * tuck * root
    bow = 1 - face.bow * np.exp(-((across / 0.16) ** 2))
    outer_top = inner_top - face.upper_lip * plump * root * (0.55 + 0.45 * arch) * bow
    outer_bottom = inner_bottom + face.lower_lip * plump * (1 - 0.45 * tuck) * root

    edge = 0.45 * size  # how quickly a mask goes from 0 to 1: over about one pixel
    lips = _between(y, outer_top, outer_bottom, edge) * (arch > 0)
    hole = _between(y, inner_top, inner_bottom, edge) * (arch > 0)
    teeth_bottom = inner_top + 0.16 * teeth * (0.4 + root)
    upper_teeth = _between(y, inner_top, teeth_bottom, edge) * hole * np.minimum(1, 2 * teeth)
    tongue_top = inner_bottom - (0.15 + 0.75 * tongue) * half_open * root
    tongue_mask = _between(y, tongue_top, inner_bottom, 0.5 * edge) * hole * (0.25 + 0.75 * tongue)

    palette = _palette(face, color)
    chin = 1 - 0.14 * np.exp(-(((y - outer_bottom - 0.13) / 0.07) ** 2)) * np.exp(-((x / 0.45) ** 2))
    image = (_skin_light(face, x, y, size) * chin)[..., None] * palette["skin"]
    lip_light = 1 - 0.25 * np.clip((inner_top - y) / 0.1, 0, 1) + 0.10 * np.clip((y - inner_bottom) / 0.15, 0, 1)
    for mask, shade in (
        (lips, lip_light[..., None] * palette["lip"]),
        (hole, palette["hole"]),
        (tongue_mask, palette["tongue"]),
        (upper_teeth, palette["teeth"]),
    ):
        image += mask[..., None] * (shade - image)
    image = np.clip(image * face.gain + 0.5, 0, 255).astype(np.uint8)
    return image if color else image[..., 0]


def _face_grid(face: _Face, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute pixel centres in the face's own coordinates: the mouth at (0, 0), turned, scaled; each (H, W)."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    right, down = axis[None, :] - face.centre[0], axis[:, None] - face.centre[1] + 0.1
    x = (face.cos * right + face.sin * down) * face.zoom
    y = (face.cos * down - face.sin * right) * face.zoom
    return x.astype(np.float32), y.astype(np.float32)


def _between(y: np.ndarray, top: np.ndarray, bottom: np.ndarray, edge: float) -> np.ndarray:
    """Make a mask that is 1 where top < y < bottom, 0 outside, linear over an edge."""
    return np.clip(np.minimum(y - top, bottom - y) * edge + 0.5, 0, 1)


def _skin_light(face: _Face, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Compute light, nose shadow, pores and moustache on the skin; the same in every frame (H, W)."""
    texture = np.random.default_rng(face.texture_seed).normal(0, 1, (size, size)).astype(np.float32)
    light = 1 + face.shade[0] * x + face.shade[1] * y + 0.015 * texture
    light -= 0.25 * np.exp(-(((y + 0.85) / 0.12) ** 2)) * np.exp(-((x / 0.22) ** 2))
    hair = np.exp(-(((y + 0.33) / 0.12) ** 2)) * np.exp(-((x / 0.5) ** 4))
    return light * (1 - face.moustache * hair * (1 + 0.4 * texture))


def _palette(face: _Face, color: bool) -> dict[str, np.ndarray]:
    colours = {"skin": face.skin, "lip": face.lip, "hole": np.array([40, 14, 16]), "tongue": face.tongue}
    colours["teeth"] = face.teeth
    luminance = np.array([0.299, 0.587, 0.114])
    return {
        name: (value if color else np.array([value @ luminance])).astype(np.float32) for name, value in colours.items()
    }
