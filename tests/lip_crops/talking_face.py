"""A film of a talking face as a phone would make it, with everything in it known.

A real face moves, turns and comes nearer; its mouth opens and closes, and a tone sounds while it is open. The file is
stored lying on its side with a rotation in the header, at an uneven rate of about 30 frames a second, with stereo audio
at 44.1 kHz.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from videos import turn

FACE = Path(__file__).parents[1] / "fixtures" / "astronaut_face.jpg"
MOUTH = 112.5 + 144.0j
"""Middle of the mouth in the image of the face."""
SIZE = (480, 640)
TICKS_PER_SECOND = 90_000
RATE_HZ = 44_100


@dataclass(frozen=True)
class Film:
    """How a film is made."""

    seconds: float = 2.0
    places: tuple[complex, ...] = (240 + 330j,)
    """Where the mouths of the people are."""
    scales: tuple[float, ...] = (1.3,)
    """How large they are."""
    missing: tuple[float, float] = (0.0, 0.0)
    """From when to when nobody is there."""
    has_audio: bool = True
    rotation_degrees: int = 90
    audio_delay_seconds: float = 0.0
    """How much later the audio stream begins; the tone still sounds while the mouth is open."""


def openness(seconds: float) -> float:
    """How far the mouth is open, 0 to 1: three times in two seconds."""
    return max(0.0, float(np.sin(2 * np.pi * 1.5 * seconds - 0.6)))


def pose(seconds: float) -> complex:
    """Turning and scaling of the head at a time: 15 degrees either way, a tenth larger or smaller."""
    return (1 + 0.1 * np.sin(2.2 * seconds)) * np.exp(1j * np.deg2rad(15) * np.sin(3.1 * seconds))


def moved(seconds: float) -> complex:
    """Where the head is, from its middle place."""
    return 35 * np.sin(2.6 * seconds) + 1j * 25 * np.sin(4.1 * seconds)


def draw_face(amount: float) -> Image.Image:
    """The face with its mouth opened."""
    face = Image.open(FACE).convert("RGB")
    hole = Image.new("L", face.size, 0)
    x, y, half = MOUTH.real, MOUTH.imag, 11 * amount
    ImageDraw.Draw(hole).ellipse((x - 15, y - half, x + 15, y + half), fill=255)
    face.paste((45, 12, 15), mask=hole.filter(ImageFilter.GaussianBlur(1)))
    return face


def draw_frame(film: Film, seconds: float) -> np.ndarray:
    """One upright frame, uint8 (H, W, 3)."""
    frame = Image.new("RGB", SIZE, (96, 110, 128))
    if film.missing[0] <= seconds < film.missing[1]:
        return np.array(frame)
    face = draw_face(openness(seconds))
    for position, scale in zip(film.places, film.scales, strict=True):
        factor = 1 / (pose(seconds) * scale)
        start = MOUTH - factor * (position + moved(seconds))
        matrix = (factor.real, -factor.imag, start.real, factor.imag, factor.real, start.imag)
        kind = {"resample": Image.Resampling.BICUBIC}
        shape = Image.new("L", face.size, 255).transform(SIZE, Image.Transform.AFFINE, matrix, **kind)
        frame.paste(face.transform(SIZE, Image.Transform.AFFINE, matrix, **kind), mask=shape)
    return np.array(frame)


def frame_times(film: Film) -> list[float]:
    """About 30 a second, uneven, every eleventh left out."""
    generator = np.random.default_rng(0)
    times = [number / 30 + generator.uniform(0, 0.006) for number in range(round(film.seconds * 30))]
    return [0.0, *(time for number, time in enumerate(times) if number % 11 and number)]


def write_film(path: Path, film: Film) -> Path:
    """Write the film."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "18", "threads": "1"})
        on_side = film.rotation_degrees % 180 == 90
        video.width, video.height = SIZE[::-1] if on_side else SIZE
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = video.time_base = Fraction(1, TICKS_PER_SECOND)
        if film.rotation_degrees:
            turn(video, film.rotation_degrees)
        audio = container.add_stream("aac", rate=RATE_HZ, layout="stereo") if film.has_audio else None
        for seconds in frame_times(film):
            stored = np.rot90(draw_frame(film, seconds), -film.rotation_degrees // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")
            frame.pts, frame.time_base = round(seconds * TICKS_PER_SECOND), video.time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            _write_tone(container, audio, film)
    return path


def _write_tone(container: av.container.OutputContainer, audio: av.AudioStream, film: Film) -> None:
    times = np.arange(round((film.seconds - film.audio_delay_seconds) * RATE_HZ)) / RATE_HZ + film.audio_delay_seconds
    loud = np.maximum(0, np.sin(2 * np.pi * 1.5 * times - 0.6))
    tone = (0.3 * loud * np.sin(2 * np.pi * 300 * times)).astype(np.float32)
    for start in range(0, len(tone), 1024):
        block = np.stack([tone[start : start + 1024]] * 2)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="stereo")
        frame.sample_rate, frame.time_base = RATE_HZ, Fraction(1, RATE_HZ)
        frame.pts = start + round(film.audio_delay_seconds * RATE_HZ)
        container.mux(audio.encode(frame))
    container.mux(audio.encode(None))
