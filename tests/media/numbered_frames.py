"""Video frames that carry their number in their brightness."""

import numpy as np


def numbered_frame(number: int, width: int, height: int) -> np.ndarray:
    """Return (H, W, 3) uint8: two halves whose brightness tells the frame's number, robust to lossy coding."""
    frame = np.empty((height, width, 3), dtype=np.uint8)
    frame[:, : width // 2] = 16 * (number % 16) + 8
    frame[:, width // 2 :] = 16 * (number // 16 % 16) + 8
    return frame


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Return the numbers of frames made by `numbered_frame`; (T, H, W, 3) or (T, H, W)."""
    gray = frames if frames.ndim == 3 else frames.mean(axis=3)
    middle = gray.shape[2] // 2
    low, high = gray[:, 4:-4, 4 : middle - 4], gray[:, 4:-4, middle + 4 : -4]
    digits = [np.floor_divide(half.mean(axis=(1, 2)), 16).astype(int) for half in (low, high)]
    return (digits[0] + 16 * digits[1]).tolist()
