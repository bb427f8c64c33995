"""Computes Whisper's log-mel window of a clip, bit for bit, without transforming the silence that fills the window.

Knows the arithmetic of transformers' `WhisperFeatureExtractor` (its torch path). Does not know files, rates of files or
encoders.

Shapes: L samples of the clip, M mel bins, F mel frames of the whole window.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

FRAME_BLOCK = 64
"""Frames are computed in multiples of this: matrix products round their last few columns in another way, and the
columns that are the last ones here are not the last ones of a whole window."""
FLOOR = 1e-10
"""Least mel power, whose logarithm is that of silence."""
RANGE_BELS = 8.0
"""What lies further below the loudest value of the window is raised to this distance."""


def whisper_log_mel(samples: np.ndarray, extractor: Any) -> Tensor:
    """Compute the log-mel window of a clip, equal to what the extractor gives.

    Only frames that reach into the clip are transformed. All others are silence, whose logarithm is known; it takes
    part in the range limit as in the original, where the loudest value of the window decides.

    Args:
        samples: (L,) float32 at the extractor's rate, at most its window.
        extractor: a `WhisperFeatureExtractor`.

    Returns:
        (M, F) float32.

    Raises:
        ValueError: a clip without samples or longer than the window.
    """
    if not 0 < len(samples) <= extractor.n_samples:
        raise ValueError(f"a clip must have 1 to {extractor.n_samples} samples, got {len(samples)}")
    num_frames = extractor.n_samples // extractor.hop_length
    with torch.autocast("cpu", enabled=False):  # a product of matrices, and the run may be in bf16
        if extractor.dither or extractor.padding_value:  # then the rest of the window is not silent
            window = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
            return torch.from_numpy(window["input_features"][0])
        powers = _mel_powers(samples, extractor, num_frames)
    levels = powers.clamp_(min=FLOOR).log10_()[0]
    silence = torch.tensor(math.log10(FLOOR), dtype=levels.dtype)
    # Where nothing was transformed one value stands for all.
    loudest = levels.max() if levels.shape[1] == num_frames else torch.maximum(levels.max(), silence)
    window = torch.empty(extractor.feature_size, num_frames)
    for columns, column_levels in ((slice(levels.shape[1]), levels), (slice(levels.shape[1], None), silence)):
        window[:, columns] = (torch.maximum(column_levels, loudest - RANGE_BELS) + 4.0) / 4.0
    return window


def _mel_powers(samples: np.ndarray, extractor: Any, num_frames: int) -> Tensor:
    """Return mel powers (1, M, computed frames): all frames that reach into the clip, and some more."""
    hop, size = extractor.hop_length, extractor.n_fft
    reaching = math.ceil((len(samples) + size // 2) / hop)
    computed = math.ceil(reaching / FRAME_BLOCK) * FRAME_BLOCK
    length = computed * hop + size  # beyond the last frame, so that no frame sees the mirrored end
    if computed > num_frames or length > extractor.n_samples:
        computed, length = num_frames, extractor.n_samples
    padded = torch.zeros(1, length)
    padded[0, : len(samples)] = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    spectrum = torch.stft(padded, size, hop, window=torch.hann_window(size), return_complex=True)
    powers = (spectrum[..., :computed].abs() ** 2).contiguous()
    return torch.from_numpy(extractor.mel_filters).to(torch.float32).T @ powers
