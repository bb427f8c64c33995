"""Samples scenes of the image corpus at random and renders them to pixels.

Knows objects, colours, letters and the pixel font. Does not know questions, files, tokens or any model.

A scene is 8 x 8 cells of 16 pixels, the patches of the synthetic vision encoder, so that every object lies in one
patch: 64 features see every object by itself, and pooled features see fewer and fewer of them by themselves.

Shapes: images are (128, 128, 3) uint8; the letter glyphs are 5 x 5 pixels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

CELL_PIXELS = 16
GRID_CELLS = 8
IMAGE_PIXELS = CELL_PIXELS * GRID_CELLS
OBJECT_PIXELS = 14
MIN_OBJECTS, MAX_OBJECTS = 2, 6
HORIZON_ROWS = (4, 5)

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "blue": (40, 70, 225),
    "green": (40, 160, 60),
    "yellow": (245, 225, 60),
    "purple": (140, 50, 180),
    "orange": (245, 140, 30),
    "white": (250, 250, 250),
}
GROUNDS = {"brown": (130, 85, 45), "gray": (135, 135, 135), "pink": (240, 170, 190), "black": (30, 30, 30)}
SKIES = {"day": ((120, 190, 245), (190, 225, 250)), "night": ((8, 12, 40), (30, 35, 85))}
SPLITS = ("train", "validation", "test")

# One row of pixels per group, left to right; sixteen letters that stay apart at 5 x 5 pixels.
_GLYPHS = {
    "a": "01110 10001 11111 10001 10001",
    "c": "01111 10000 10000 10000 01111",
    "e": "11111 10000 11110 10000 11111",
    "h": "10001 10001 11111 10001 10001",
    "i": "11111 00100 00100 00100 11111",
    "j": "00111 00010 00010 10010 01100",
    "k": "10010 10100 11000 10100 10010",
    "l": "10000 10000 10000 10000 11111",
    "m": "10001 11011 10101 10001 10001",
    "o": "01110 10001 10001 10001 01110",
    "p": "11110 10001 11110 10000 10000",
    "s": "01111 10000 01110 00001 11110",
    "t": "11111 00100 00100 00100 00100",
    "v": "10001 10001 01010 01010 00100",
    "x": "10001 01010 00100 01010 10001",
    "z": "11111 00010 00100 01000 11111",
}
LETTERS = tuple(_GLYPHS)


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape with a letter on it, in the cell (`column`, `row`), moved by `shift` pixels inside it."""

    shape: str
    colour: str
    letter: str
    column: int
    row: int
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """A scene is objects over a sky (`time`) and a ground of one colour that begins at cell row `horizon_row`."""

    objects: tuple[SceneObject, ...]
    time: str
    ground: str
    horizon_row: int = HORIZON_ROWS[0]

    def split(self) -> str:
        """Compute the split this scene belongs to, by a digest of what it shows: 80 % train, 10 % validation, 10 %
        test.

        Every corpus, whatever its seed, agrees on it, so no test scene can be in the pre-training of the LLM.
        """
        shown = sorted((o.row, o.column, o.shape, o.colour, o.letter) for o in self.objects)
        digest = hashlib.sha256(repr((shown, self.time, self.ground)).encode()).digest()[0] % 10
        return {0: "test", 1: "validation"}.get(digest, "train")


def random_scene(generator: np.random.Generator) -> Scene:
    """Sample a scene of 2 to 6 objects; at least two of its shapes occur once, so that questions can refer to them."""
    num_objects = int(generator.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    shapes = [SHAPES[i] for i in generator.permutation(len(SHAPES))[:num_objects]]
    if num_objects > 3 and generator.random() < 0.3:
        shapes[-1] = shapes[-2]
    # Half of the scenes have a palette of three colours: else "how many red objects" is almost always zero or one.
    palette = list(COLOURS) if generator.random() < 0.5 else [list(COLOURS)[i] for i in generator.permutation(7)[:3]]
    cells = generator.permutation(GRID_CELLS**2)[:num_objects]
    colours = generator.integers(len(palette), size=num_objects)
    letters = generator.integers(len(LETTERS), size=num_objects)
    shifts = generator.integers(-1, 2, size=(num_objects, 2))
    objects = tuple(
        SceneObject(
            shape=shapes[i],
            colour=palette[colours[i]],
            letter=LETTERS[letters[i]],
            column=int(cells[i]) % GRID_CELLS,
            row=int(cells[i]) // GRID_CELLS,
            shift=(int(shifts[i, 0]), int(shifts[i, 1])),
        )
        for i in range(num_objects)
    )
    time, ground, horizon = generator.integers((len(SKIES), len(GROUNDS), len(HORIZON_ROWS)))
    return Scene(objects, list(SKIES)[time], list(GROUNDS)[ground], HORIZON_ROWS[horizon])


def random_scenes(split: str, seed: int) -> Iterator[Scene]:
    """Yield scenes of one split without end, the same for the same seed.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    generator = np.random.default_rng([seed, SPLITS.index(split), 7])
    while True:
        scene = random_scene(generator)
        if scene.split() == split:
            yield scene


def render_scene(scene: Scene) -> Image.Image:
    """Render a scene as an image: RGB, 128 x 128 pixels."""
    pixels = _background(scene.time, scene.ground, scene.horizon_row).copy()
    for thing in scene.objects:
        margin = (CELL_PIXELS - OBJECT_PIXELS) // 2
        top = thing.row * CELL_PIXELS + margin + thing.shift[1]
        left = thing.column * CELL_PIXELS + margin + thing.shift[0]
        area = pixels[top : top + OBJECT_PIXELS, left : left + OBJECT_PIXELS]
        image, opacity = _object_image(thing.shape, thing.colour, thing.letter)
        area[:] = np.round(area * (1.0 - opacity) + image * opacity).astype(np.uint8)
    return Image.fromarray(pixels)


@lru_cache(maxsize=64)
def _background(time: str, ground: str, horizon_row: int) -> np.ndarray:
    pixels = np.empty((IMAGE_PIXELS, IMAGE_PIXELS, 3), dtype=np.uint8)
    top, bottom = (np.array(colour, dtype=float) for colour in SKIES[time])
    horizon = horizon_row * CELL_PIXELS
    height = np.linspace(0.0, 1.0, horizon)[:, None]
    pixels[:horizon] = np.round(top * (1 - height) + bottom * height)[:, None]
    pixels[horizon:] = GROUNDS[ground]
    if time == "night":
        stars = np.random.default_rng(0)
        pixels[stars.integers(horizon, size=40), stars.integers(IMAGE_PIXELS, size=40)] = (200, 200, 210)
    return pixels


@lru_cache(maxsize=1024)
def _object_image(shape: str, colour: str, letter: str) -> tuple[np.ndarray, np.ndarray]:
    """Render an object as 14 x 14 pixels and its opacity: a dark rim, the filled shape, the letter in the middle."""
    fill = np.array(COLOURS[colour], dtype=float)
    rim = _shape_mask(shape, OBJECT_PIXELS / 2)
    inner = _shape_mask(shape, OBJECT_PIXELS / 2 - 1.0)
    image = fill * inner + 20.0 * (1.0 - inner)
    ink = 0.0 if fill @ (0.299, 0.587, 0.114) > 110 else 255.0
    glyph = np.array([[bit == "1" for bit in row] for row in _GLYPHS[letter].split()])
    top = 5 if shape != "triangle" else 7
    image[top : top + 5, 5:10][glyph] = ink
    return image, rim


@lru_cache(maxsize=64)
def _shape_mask(shape: str, radius: float) -> np.ndarray:
    """Compute the coverage in 0..1 of a shape of a given radius, (14, 14, 1): drawn eight times larger and averaged
    down."""
    scale, middle = 8, OBJECT_PIXELS * 4.0
    canvas = Image.new("L", (OBJECT_PIXELS * scale, OBJECT_PIXELS * scale))
    pen, r = ImageDraw.Draw(canvas), radius * scale
    if shape == "circle":
        pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill=255)
    else:
        pen.polygon([(middle + r * x, middle + r * y) for x, y in _outline(shape)], fill=255)
    return np.asarray(canvas.reduce(scale), dtype=float)[..., None] / 255.0


def _outline(shape: str) -> list[tuple[float, float]]:
    """List the corners of a shape in units of its radius, y downwards."""
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.6)
        return [(float(r * np.sin(a)), float(-r * np.cos(a))) for r, a in zip(radii, angles, strict=True)]
    arm = 0.5
    return {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0.0, -1.1), (1.1, 1.0), (-1.1, 1.0)],
        "diamond": [(0.0, -1.05), (1.05, 0.0), (0.0, 1.05), (-1.05, 0.0)],
        "cross": [
            *((-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)),
            *((arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm)),
        ],
    }[shape]
