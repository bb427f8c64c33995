"""Transforms raw media to what an encoder takes: pixels, log-mel windows, waveforms, filterbank frames, lip crops.

Each transform is a small picklable callable, `transform(raw, generator=None) -> (values, length)`. With a generator it
augments, for training; without one it is a plain function. Does not know files, batches or budgets; only
`build_transform` knows where a transform's parameters come from.

Shapes: L samples of a waveform, M mel bins, F mel frames, T video frames, H rows and W columns, S side of a crop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm.media import Audio, Video, to_gray
from mllm.transforms import filterbank
from mllm.transforms.image_processors import image_processor_class
from mllm.transforms.log_mel import whisper_log_mel

LIP_MEAN, LIP_STD = 0.421, 0.165
"""Mean and deviation of grey mouth crops in 0..1, as in AV-HuBERT and every published system after it."""

MOUTH_SHARE = 0.25
"""Least share of a frame's area that a crop of lips shows; of less, the frame is a face or more."""
MOUTH_PIXELS = 128
"""Longest side of frames that are taken for crops whatever an encoder cuts from them; usual ones have 96 pixels."""
MOUTH_ASPECT = 1.3
"""Frames of crops are square or nearly so; cameras begin at 4:3."""


class NotMouthCrops(ValueError):
    """Says that frames show far more than the mouth that a lip encoder is to read."""


class MediaTransform(Protocol):
    """Turns one raw medium into encoder input; the length counts images (1), samples, or frames."""

    def __call__(self, raw: Any, generator: np.random.Generator | None = None) -> tuple[Tensor, int]: ...


def standardize(samples: np.ndarray, epsilon: float) -> np.ndarray:
    """Bring one utterance to zero mean and unit variance, (L,) float32: (x - mean) / sqrt(variance + epsilon)."""
    return ((samples - samples.mean()) / np.sqrt(samples.var() + epsilon)).astype(np.float32)


@dataclass(frozen=True)
class ImageTransform:
    """Turns an image into (3, H, W) float pixels, by a Hugging Face image processor (its size, mean and deviation)."""

    processor: Any

    def __call__(self, raw: Image.Image, generator: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Process one image; ValueError when the processor makes anything but one of it (tiles, for example)."""
        pixels = self.processor(images=[raw], return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            name = type(self.processor).__name__
            raise ValueError(f"{name} must give one image (1, 3, H, W) per image, got {tuple(pixels.shape)}")
        return pixels[0], 1

    @property
    def resample(self) -> int:
        """Return Pillow's number of the interpolation that images are resized by."""
        return int(getattr(self.processor, "resample", None) or 3)

    def many(self, images: Sequence[Any]) -> Tensor:
        """Process several images, Pillow's or uint8 (3, h, w), to (P, 3, H, W)."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        assert pixels.ndim == 4, pixels.shape
        return pixels


@dataclass(frozen=True)
class PatchTransform:
    """Turns an image in its own shape into its patches (rows, columns, values of a patch), by SigLIP 2's image
    processor.

    It is brought to the largest size of its shape that has at most `max_num_patches` patches, whole ones per side.
    """

    processor: Any

    def __call__(self, raw: Image.Image, generator: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Return its patches without padding."""
        features = self.processor(images=[raw], return_tensors="pt")
        rows, columns = features["spatial_shapes"][0].tolist()
        return features["pixel_values"][0, : rows * columns].unflatten(0, (rows, columns)), 1


@dataclass(frozen=True)
class Waveform:
    """Turns audio into the waveform (L,) that HuBERT, WavLM and wav2vec 2.0 take.

    Args:
        sample_rate_hz: rate the encoder was trained at.
        standardized: zero mean and unit variance per utterance; what `do_normalize` of the checkpoint's feature
            extractor says.
    """

    sample_rate_hz: int = 16_000
    standardized: bool = False

    def __call__(self, raw: Audio, generator: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Return the waveform; ValueError for audio at another rate."""
        _check_rate(raw, self.sample_rate_hz)
        samples = standardize(raw.samples, epsilon=1e-7) if self.standardized else raw.samples
        return torch.from_numpy(samples), len(samples)


@dataclass(frozen=True)
class WhisperMel:
    """Turns audio into Whisper's log-mel window (M, F), always the full window; the length stays that of the audio.

    Args:
        extractor: a `WhisperFeatureExtractor`; its rate, mel bins and window apply.
        standardized: zero mean and unit variance of the waveform first, as the published AVSR systems do.
        pads: false leaves out the silence behind the clip and gives (frames, M), two mel frames to each whole feature
            frame of the clip.
    """

    extractor: Any
    standardized: bool = False
    pads: bool = True

    @property
    def window_seconds(self) -> float:
        """Return the longest audio that is taken, in seconds."""
        return self.extractor.n_samples / self.extractor.sampling_rate

    def __call__(self, raw: Audio, generator: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Return the window; ValueError for audio at another rate or longer than the window."""
        rate_hz, window = self.extractor.sampling_rate, self.extractor.n_samples
        _check_rate(raw, rate_hz)
        if len(raw.samples) > window:
            limit = f"{window / rate_hz:g} seconds"
            raise ValueError(
                f"the audio lasts {raw.seconds:.2f} seconds, the encoder's window is {limit}; with long_audio chunk, "
                "generate, evaluate and Answerer answer about one window after the other, of audio alone or with the "
                "video of its clip"
            )
        samples = standardize(raw.samples, epsilon=1e-8) if self.standardized else raw.samples
        window = whisper_log_mel(samples, self.extractor)
        if self.pads:
            return window, len(samples)
        num_mel_frames = 2 * (len(samples) // (2 * self.extractor.hop_length))
        return window[:, :num_mel_frames].T.contiguous(), len(samples)


@dataclass(frozen=True)
class Filterbank:
    """Turns audio into the stacked filterbank frames (T, 104) that AV-HuBERT hears; the length is that of the audio."""

    def __call__(self, raw: Audio, generator: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Return the frames; ValueError for audio at another rate or without samples."""
        _check_rate(raw, filterbank.SAMPLE_RATE_HZ)
        filterbank.num_stacked_frames(len(raw.samples))
        return torch.from_numpy(filterbank.stacked_filterbank(raw.samples)), len(raw.samples)


@dataclass(frozen=True)
class LipTransform:
    """Turns video into normalised grey crops (T, 1, S, S) in float32: (grey in 0..1 - mean) / std.

    The crop is cut from the centre; with a generator from a random place, the same for the whole clip.

    Args:
        size: the shorter side of each frame is first brought to this many pixels (bilinear, antialiased); None takes
            the frames as they are.
        crop_size: side S of the square that is cut out.
        mean: subtracted after scaling to 0..1.
        std: divided by.

    Raises:
        ValueError: values that contradict each other.
    """

    size: int | None
    crop_size: int
    mean: float = LIP_MEAN
    std: float = LIP_STD

    def __post_init__(self) -> None:
        if not 0 < self.crop_size <= (self.size or self.crop_size):
            raise ValueError(f"crop_size must be 1 to size ({self.size}), got {self.crop_size}")
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def __call__(self, raw: Video, generator: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Return the crops; ValueError when a frame is smaller than the crop, NotMouthCrops when it shows far more than
        it.
        """
        self._check_mouth(*raw.frames.shape[1:3])
        frames = torch.from_numpy(to_gray(raw.frames) if raw.frames.ndim == 4 else raw.frames)[:, None]
        # Cut first and converted then, wherever nothing has to be resized: eight bits a pixel move faster than 32.
        if self.size is not None and min(frames.shape[-2:]) != self.size:
            gray = self._crop(self._resize(frames.float() / 255), generator).clone()
        else:
            gray = self._crop(frames, generator).float().div_(255)  # what is cut off is never converted
        return gray.sub_(self.mean).div_(self.std), len(gray)

    def _check_mouth(self, height: int, width: int) -> None:
        """Refuse what cannot be crops of mouths by their size alone; the middle of a face would be read as lips."""
        shorter, longer = min(height, width), max(height, width)
        if self.size is None:
            is_mouth = longer <= MOUTH_PIXELS or self.crop_size**2 >= MOUTH_SHARE * height * width
        else:  # who brings frames to a size may well have large crops, but not those of a camera's shape
            is_mouth = shorter <= 2 * self.size or longer < MOUTH_ASPECT * shorter
        if not is_mouth:
            raise NotMouthCrops(
                f"the frames have {width} x {height} pixels, and lips are read from the middle "
                f"{self.crop_size} x {self.crop_size} (crop_pixels) of crops around the mouth"
            )

    def _resize(self, frames: Tensor) -> Tensor:
        assert self.size is not None
        shorter = min(frames.shape[-2:])
        size = [round(side * self.size / shorter) for side in frames.shape[-2:]]
        return torch.nn.functional.interpolate(frames, size, mode="bilinear", antialias=True)

    def _crop(self, frames: Tensor, generator: np.random.Generator | None) -> Tensor:
        height, width = frames.shape[-2:]
        if min(height, width) < self.crop_size:
            got = f"{width} x {height}"
            raise ValueError(f"frames must be at least {self.crop_size} pixels (crop_size) wide and high, got {got}")
        free = (height - self.crop_size, width - self.crop_size)
        top, left = (room // 2 if generator is None else int(generator.integers(room + 1)) for room in free)
        return frames[..., top : top + self.crop_size, left : left + self.crop_size]


def build_transform(medium: str, encoder: Any, preprocessor: Mapping[str, Any]) -> MediaTransform:
    """Build the transform that an encoder needs.

    Args:
        medium: image, audio or video.
        encoder: config of the encoder's backbone; Whisper takes log-mel windows, AV-HuBERT filterbank
            frames, other audio encoders waveforms.
        preprocessor: image: `to_dict()` of a Hugging Face image processor. audio: `to_dict()` of its feature
            extractor, `normalize_audio` to standardise each utterance, and `pads_audio`, whether Whisper's window is
            filled. video: `crop_pixels`.

    Raises:
        ValueError: an unknown medium, or an image processor or feature extractor that transformers does not know.
    """
    builders = {"image": _build_image, "audio": _build_audio, "video": _build_video}
    if medium not in builders:
        raise ValueError(f"medium must be one of {', '.join(builders)}, got {medium!r}")
    return builders[medium](encoder, dict(preprocessor))


def _build_image(encoder: Any, preprocessor: dict[str, Any]) -> MediaTransform:
    processor = image_processor_class(preprocessor.get("image_processor_type", "")).from_dict(preprocessor)
    return PatchTransform(processor) if encoder.model_type == "siglip2_vision_model" else ImageTransform(processor)


def _build_audio(encoder: Any, preprocessor: dict[str, Any]) -> MediaTransform:
    from transformers import WhisperFeatureExtractor

    standardized = bool(preprocessor.pop("normalize_audio", False))
    pads = bool(preprocessor.pop("pads_audio", True))
    if encoder.model_type == "av_hubert_audio":
        return Filterbank()
    if encoder.model_type == "whisper":
        return WhisperMel(WhisperFeatureExtractor.from_dict(preprocessor), standardized, pads)
    standardized = standardized or bool(preprocessor.get("do_normalize", False))
    return Waveform(preprocessor.get("sampling_rate", 16_000), standardized)


def _build_video(encoder: Any, preprocessor: dict[str, Any]) -> MediaTransform:
    return LipTransform(size=preprocessor.get("size_pixels"), crop_size=preprocessor["crop_pixels"])


def _check_rate(audio: Audio, sample_rate_hz: int) -> None:
    """Refuse audio at another rate, which would be heard faster or slower."""
    if audio.sample_rate_hz != sample_rate_hz:
        raise ValueError(f"the encoder takes audio at {sample_rate_hz} Hz, got {audio.sample_rate_hz} Hz")
