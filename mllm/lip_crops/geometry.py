"""Turns face landmarks with gaps into one upright mouth crop per frame: interpolation, smoothing, similarity, warp.

The face is turned and scaled to a mean face; the crop follows the head at once and the mouth slowly, so that neither
head movements nor the opening of the jaw move the image, and what is left moving in it is speech. Points are complex
numbers x + iy (y points down), in which a similarity is one factor: turning and scaling is a product.
Knows points and pixels. Does not know what finds the points, nor files.

Shapes: T frames, P points, 8 stable points, H rows and W columns of a frame, S side of a crop.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

CROP_PIXELS = 96
SMOOTHING_FRAMES = 6
"""On either side of a frame, as in the published lip-reading systems: a window of about half a second at 25 Hz."""
PIXELS_PER_MILLIMETRE = 0.92

MEAN_FACE_MILLIMETRES: dict[str, complex] = {
    "right eye, outer corner": -44.5 - 65j,
    "right eye, inner corner": -16.5 - 65j,
    "left eye, inner corner": 16.5 - 65j,
    "left eye, outer corner": 44.5 - 65j,
    "nose bridge": 0 - 70j,
    "nose base": 0 - 22j,
    "nostril, right": -17 - 27j,
    "nostril, left": 17 - 27j,
}
"""The stable points of an average adult face, from the middle of the mouth (0), symmetric.

Composed of rounded lengths that are measured on adults: outer corners of the eyes 89 mm apart, inner ones 33 mm, the
nose 34 mm wide and 48 mm high from the bridge to its base, the base 22 mm above the middle of the mouth. A mouth is
about 51 mm wide, which is 47 pixels: half the crop, about the framing of the published ones. Only direction and size
are taken from it; where a person's mouth is comes from that person. Points that speech moves are not among them.
"""


@dataclass(frozen=True, slots=True, eq=False)
class CropPath:
    """A crop path says where the crop is in every frame.

    Attributes:
        factors: (T,) complex; a vector in the frame times this is the vector in the crop, in pixels.
        centres: (T,) complex; the point of the frame that stands in the middle of the crop.
    """

    factors: np.ndarray
    centres: np.ndarray


def fill_gaps(points: np.ndarray) -> np.ndarray:
    """Fill in frames in which no face was found: between two others on a straight line, at the ends a copy.

    Args:
        points: (T, P) complex; NaN where a frame has none.

    Raises:
        ValueError: no frame has points.
    """
    seen = np.flatnonzero(~np.isnan(points).any(axis=1))
    if not len(seen):
        raise ValueError("there is a face in none of the frames")
    frames = np.arange(len(points))
    columns = [np.interp(frames, seen, column[seen]) for column in points.T]
    return np.stack(columns, axis=1)


def smooth(values: np.ndarray, margin_frames: int = SMOOTHING_FRAMES) -> np.ndarray:
    """Average over the frames around each one; the window stays symmetric and so gets shorter towards the ends.

    Symmetric, since a lopsided window would lag behind a head that moves steadily.

    Args:
        values: (T, ...) real or complex.
        margin_frames: frames on either side.
    """
    count = len(values)
    frames = np.arange(count)
    margins = np.minimum(margin_frames, np.minimum(frames, count - 1 - frames))
    # Differences of running sums: every window costs two look-ups, however long it is.
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    lengths = (2 * margins + 1).reshape(-1, *[1] * (values.ndim - 1))
    return (sums[frames + margins + 1] - sums[frames - margins]) / lengths


def similarity_factors(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Fit the turning and scaling that brings points nearest to the target, in least squares, (T,) complex.

    Not a robust fit: the points come from a model of a whole face, so that no single one is an outlier, and choosing
    other points from frame to frame would make the image jump.

    Args:
        points: (T, P) complex.
        target: (P,) complex.

    Raises:
        ValueError: the points of a frame coincide.
    """
    centred = points - points.mean(axis=1, keepdims=True)
    wanted = target - target.mean()
    spread = (centred.real**2 + centred.imag**2).sum(axis=1)
    if not (spread > 0).all():
        raise ValueError(f"the face of frame {int(np.argmin(spread))} has no extent")
    # Minimises sum |factor * centred - wanted|^2: its normal equation is linear in the one complex unknown.
    return (centred.conj() * wanted).sum(axis=1) / spread


def crop_path(stable: np.ndarray, mouth: np.ndarray, *, margin_frames: int = SMOOTHING_FRAMES) -> CropPath:
    """Compute where to crop.

    Args:
        stable: (T, 8) complex, in the order of `MEAN_FACE_MILLIMETRES`; NaN in frames without a face.
        mouth: (T, P) complex; NaN in the same frames.
        margin_frames: of the smoothing.

    Raises:
        ValueError: no face in any frame, or one without an extent.
    """
    stable, mouth = fill_gaps(stable), fill_gaps(mouth)
    target = np.array(list(MEAN_FACE_MILLIMETRES.values())) * PIXELS_PER_MILLIMETRE
    factors = similarity_factors(smooth(stable, margin_frames), target)
    head = stable.mean(axis=1)
    offsets = smooth((mouth.mean(axis=1) - head) * factors, margin_frames)  # in the face's own frame
    return CropPath(factors, head + offsets / factors)


def crop(frame: np.ndarray, factor: complex, centre: complex, *, size: int = CROP_PIXELS) -> np.ndarray:
    """Cut one turned and scaled square out of a frame.

    A frame that is shrunk is averaged over whole pixels first, so that nothing aliases. Beyond the border the outermost
    pixels are repeated.

    Args:
        frame: uint8 (H, W) or (H, W, 3).
        factor: see `CropPath`.
        centre: see `CropPath`.
        size: side S.

    Returns:
        uint8 (S, S) or (S, S, 3).
    """
    points = centre + _grid(size) / factor
    # The frame is averaged over step x step pixels first; the box around the points must hold whole such blocks.
    step = max(1, int(1 / abs(factor)))
    left, top = (int(np.floor(part.min())) - step for part in (points.real, points.imag))
    columns, rows = (
        -(-(int(np.ceil(part.max())) + step + 1 - start) // step) * step
        for part, start in ((points.real, left), (points.imag, top))
    )
    box = frame[np.clip(np.arange(top, top + rows), 0, len(frame) - 1)]
    box = box[:, np.clip(np.arange(left, left + columns), 0, frame.shape[1] - 1)]
    if step > 1:
        box = np.asarray(Image.fromarray(box).reduce(step))
    x, y = ((part - start + 0.5) / step - 0.5 for part, start in ((points.real, left), (points.imag, top)))
    return np.clip(_bilinear(box.astype(np.float32), x, y) + 0.5, 0, 255).astype(np.uint8)


def fraction_outside(path: CropPath, width: int, height: int, *, size: int = CROP_PIXELS) -> float:
    """Measure the fraction, 0 to 1, of the crops of all frames that is beyond the frames' border, by every eighth
    pixel."""
    points = path.centres[:, None, None] + _grid(size)[4::8, 4::8] / path.factors[:, None, None]
    beyond = (points.real < -0.5) | (points.real > width - 0.5) | (points.imag < -0.5) | (points.imag > height - 0.5)
    return float(beyond.mean())


def _grid(size: int) -> np.ndarray:
    """Make the pixels of a crop as vectors from its middle, (S, S) complex."""
    axis = np.arange(size) - (size - 1) / 2
    return axis[None, :] + 1j * axis[:, None]


def _bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate an image (H, W) or (H, W, 3) between its pixels; no point may be outside."""
    left = np.clip(np.floor(x).astype(int), 0, image.shape[1] - 2)
    top = np.clip(np.floor(y).astype(int), 0, image.shape[0] - 2)
    extra = (..., *[None] * (image.ndim - 2))
    right_weight, low_weight = (x - left).astype(np.float32)[extra], (y - top).astype(np.float32)[extra]
    upper = image[top, left] * (1 - right_weight) + image[top, left + 1] * right_weight
    lower = image[top + 1, left] * (1 - right_weight) + image[top + 1, left + 1] * right_weight
    return upper * (1 - low_weight) + lower * low_weight
