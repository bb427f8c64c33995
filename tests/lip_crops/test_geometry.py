"""What the crop promises: however a head is held, moves or trembles, its mouth stands upright in one place."""

import numpy as np
import pytest
from PIL import Image

from mllm.lip_crops.geometry import (
    CROP_PIXELS,
    MEAN_FACE_MILLIMETRES,
    PIXELS_PER_MILLIMETRE,
    crop,
    crop_path,
    fill_gaps,
    fraction_outside,
    similarity_factors,
    smooth,
)

FACE = np.array(list(MEAN_FACE_MILLIMETRES.values()))
MOUTH = np.array([-25 + 0j, -10 - 6j, 10 - 6j, 25 + 0j, 10 + 9j, -10 + 9j])
MOUTH = MOUTH - MOUTH.mean()
MIDDLE = (CROP_PIXELS - 1) / 2 * (1 + 1j)


def random_poses(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A smooth walk of turning and scaling, and of places, (T,) complex each."""
    generator = np.random.default_rng(seed)
    times, phases = np.arange(count) / 25, generator.uniform(0, 6, 4)
    angle = generator.uniform(-np.pi, np.pi) + 0.3 * np.sin(2 * times + phases[0])
    scale = generator.uniform(0.5, 6) * (1 + 0.15 * np.sin(1.5 * times + phases[1]))
    position = 300 + 200j + 80 * np.sin(3 * times + phases[2]) + 50j * np.sin(2 * times + phases[3])
    return scale * np.exp(1j * angle), position


def seen(poses: np.ndarray, positions: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return positions[:, None] + poses[:, None] * shape


def test_gaps_become_straight_lines_and_ends_copies() -> None:
    points = np.array([[np.nan], [2 + 4j], [np.nan], [np.nan], [8 + 1j], [np.nan]], dtype=complex)
    assert fill_gaps(points)[:, 0].tolist() == [2 + 4j, 2 + 4j, 4 + 3j, 6 + 2j, 8 + 1j, 8 + 1j]
    with pytest.raises(ValueError, match="a face in none of the frames"):
        fill_gaps(np.full((3, 2), np.nan, dtype=complex))


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_smoothing_is_the_mean_over_a_window_that_stays_symmetric(count: int) -> None:
    values = np.random.default_rng(count).normal(size=(count, 3)) * (1 + 2j)
    for frame, smoothed in enumerate(smooth(values, 6)):
        margin = min(6, frame, count - 1 - frame)
        np.testing.assert_allclose(smoothed, values[frame - margin : frame + margin + 1].mean(axis=0), atol=1e-12)
    steady = np.arange(count, dtype=float)
    np.testing.assert_allclose(smooth(steady), steady, atol=1e-12)  # no lag behind a steady movement


def test_the_similarity_is_the_least_squares_solution() -> None:
    generator = np.random.default_rng(3)
    points = generator.normal(size=(4, 8)) + 1j * generator.normal(size=(4, 8))
    for corners, factor in zip(points, similarity_factors(points, FACE), strict=True):
        columns = np.stack([corners - corners.mean(), np.ones(8)], axis=1)
        np.testing.assert_allclose(factor, np.linalg.lstsq(columns, FACE - FACE.mean(), rcond=None)[0][0])
    with pytest.raises(ValueError, match="face of frame 1 has no extent"):
        similarity_factors(np.stack([FACE, np.ones(8)]), FACE)


@pytest.mark.parametrize("seed", range(8))
def test_a_turned_scaled_moving_and_trembling_face_comes_out_upright_in_one_place(seed: int) -> None:
    poses, positions = random_poses(seed)
    generator = np.random.default_rng(seed)

    def trembling(points: np.ndarray) -> np.ndarray:
        noise = generator.normal(size=points.shape) + 1j * generator.normal(size=points.shape)
        return points + 0.7 * abs(poses)[:, None] * noise  # 0.7 mm each way

    stable, mouth = trembling(seen(poses, positions, FACE)), trembling(seen(poses, positions, MOUTH))
    lost = generator.choice(len(poses), 12, replace=False)
    stable[lost] = mouth[lost] = np.nan
    path = crop_path(stable, mouth)
    shown = (seen(poses, positions, MOUTH) - path.centres[:, None]) * path.factors[:, None]
    inner = np.setdiff1d(np.arange(2, len(poses) - 2), lost)
    assert np.abs(shown[inner] - MOUTH * PIXELS_PER_MILLIMETRE).max() < 2.5  # pixels of a crop of 96
    assert np.abs(shown[inner] - MOUTH * PIXELS_PER_MILLIMETRE).mean() < 0.8


def test_the_crop_follows_the_head_and_not_the_jaw() -> None:
    poses, positions = np.ones(50, dtype=complex), 200 + 100j + 40 * np.sin(np.arange(50) / 4)
    jaw = 8j * (1 + np.sin(np.arange(50) * 1.7))[:, None]  # four times a second, 16 mm
    path = crop_path(seen(poses, positions, FACE), seen(poses, positions, MOUTH) + jaw)
    against_head = path.centres - positions
    assert np.ptp(against_head.real) < 1e-9
    assert np.ptp(against_head.imag[6:-6]) < 2
    assert against_head.imag.mean() == pytest.approx(8, abs=1)


def test_a_crop_at_rest_is_a_piece_of_the_frame() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop(frame, 1, MIDDLE + 20 + 10j), frame[10:106, 20:116])
    np.testing.assert_array_equal(crop(frame[..., 0], 1, MIDDLE + 20 + 10j), frame[10:106, 20:116, 0])
    upright = crop(frame, 1j, MIDDLE + 20 + 10j)  # a vector to the right comes out as one downwards
    np.testing.assert_array_equal(upright, np.rot90(frame[10:106, 20:116], -1))


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (192, 192), dtype=np.uint8)
    means = frame.reshape(96, 2, 96, 2).mean(axis=(1, 3))
    assert np.abs(crop(frame, 0.5, 95.5 + 95.5j) - means).max() <= 1
    fine = np.tile(np.array([0, 255], dtype=np.uint8), (600, 300))  # stripes finer than the crop can show
    assert np.ptp(crop(fine, 0.23 * np.exp(0.4j), 300 + 300j)) < 40
    slope = np.tile(np.arange(100, dtype=np.uint8) * 2, (100, 1))
    wide = crop(slope, 4, 50 + 50j).astype(float)
    assert np.abs(wide - 2 * (50 + (np.arange(96) - 47.5) / 4)).max() <= 1


@pytest.mark.parametrize("centre", [0j, 79 + 59j, -500 + 900j, 1e5 - 1e5j])
@pytest.mark.parametrize("factor", [1, 0.2 * np.exp(1j), 7j])
def test_beyond_the_border_the_outermost_pixels_go_on(centre: complex, factor: complex) -> None:
    frame = np.full((60, 80, 3), 7, dtype=np.uint8)
    np.testing.assert_array_equal(crop(frame, factor, centre), np.full((96, 96, 3), 7))
    tiny = np.full((1, 1), 9, dtype=np.uint8)
    np.testing.assert_array_equal(crop(tiny, factor, centre), np.full((96, 96), 9))


def test_how_much_is_outside_is_told() -> None:
    poses = np.full(30, PIXELS_PER_MILLIMETRE**-1, dtype=complex)
    within = crop_path(seen(poses, np.full(30, 100 + 100j), FACE), seen(poses, np.full(30, 100 + 100j), MOUTH))
    assert fraction_outside(within, 200, 200) == 0
    assert fraction_outside(within, 100, 200) == pytest.approx(0.5, abs=0.1)


def test_a_image_that_is_turned_and_scaled_gives_the_same_crop() -> None:
    generator = np.random.default_rng(5)
    rough = Image.fromarray(generator.integers(0, 256, (40, 40), dtype=np.uint8))
    image = rough.resize((400, 400), Image.Resampling.BICUBIC)
    wanted = crop(np.array(image), 0.9, 200 + 200j).astype(int)
    for degrees, scale in ((30, 1.0), (-75, 1.6), (180, 2.3)):
        pose = scale * np.exp(1j * np.deg2rad(degrees))
        inverse = 1 / pose
        half = (0.5 + 0.5j) * (1 - inverse)  # Pillow counts from the corner of a pixel
        start = 200 + 200j - (450 + 450j) * inverse + half
        matrix = (inverse.real, -inverse.imag, start.real, inverse.imag, inverse.real, start.imag)
        turned = image.transform((900, 900), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)
        cut = crop(np.array(turned), 0.9 / pose, 450 + 450j).astype(int)
        assert np.abs(cut - wanted).mean() < 2
