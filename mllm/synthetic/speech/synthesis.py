"""Synthesises speech with phone timings, by eSpeak NG through the `espeakng_loader` wheel.

Knows how to drive the C library. Does not know what is said, who is in which split, or what a face looks like.

    utterance = synthesise("place blue at f two now", VOICES["train"][0])
    utterance.samples                   float32 (L,), 16 kHz, mono, root mean square `LEVEL_RMS`
    utterance.phones                    ((symbol, start_seconds, end_seconds), ...) from 0 to the end without gaps;
                                        symbols are those of `mllm.synthetic.speech.phones.PHONES`, "sil" for silence
    phone_string(utterance.phones)      ("p", "l", "ey", ...) without the silences

The result is a function of the arguments alone. The library itself keeps state from one utterance to the next (pitch
flutter and noise go on where they were), so every utterance loads the library afresh; that takes half a millisecond.
The wheel is GPL-3 and therefore an extra, never a part of this package.
"""

import ctypes
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from mllm.synthetic.speech.phones import SILENCE, phones_of_ipa
from mllm.synthetic.speech.voices import HIGHEST_PITCH, HIGHEST_RATE_WPM, LOWEST_PITCH, LOWEST_RATE_WPM, Speaker, Voice
from mllm.utils.extras import install_line

SAMPLE_RATE_HZ = 16_000
LEVEL_RMS = 0.05
LEAD_SECONDS = 0.1  # silence before and after what the synthesiser says
_SYNTHESISER_RATE_HZ = 22_050

# Values of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS_IPA_DONT_EXIT = 0x0001 | 0x0002 | 0x8000
_EVENT_END_OF_LIST, _EVENT_PHONEME = 0, 7
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_UTF8 = 1
_POSITION_CHARACTER = 1

Phone = tuple[str, float, float]
_lock = threading.Lock()  # the library is one global object


@dataclass(frozen=True)
class Utterance:
    """Spoken text: samples (L,) float32 at `SAMPLE_RATE_HZ`, and when which phone is spoken, in seconds."""

    text: str
    samples: np.ndarray
    phones: tuple[Phone, ...]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def synthesise(text: str, voice: Voice, *, speaking_rate_wpm: int = 170, pitch: int = 50) -> Utterance:
    """Speak one sentence.

    Args:
        text: what to say.
        voice: who says it.
        speaking_rate_wpm: words per minute.
        pitch: 0 to 99; 50 is the voice's own pitch.

    Raises:
        ImportError: the synthesiser is not installed; the message has the pip line.
        ValueError: empty text, a voice the synthesiser does not have, a rate or pitch out of range.
    """
    samples, events = _speak(text, voice, speaking_rate_wpm, pitch)
    return Utterance(text=text, samples=samples, phones=_intervals(events, len(samples) / SAMPLE_RATE_HZ))


def say(text: str, speaker: Speaker) -> Utterance:
    """Call `synthesise` with the voice, the rate and the pitch of a speaker."""
    return synthesise(text, speaker.voice, speaking_rate_wpm=speaker.speaking_rate_wpm, pitch=speaker.pitch)


def samples_of(text: str, speaker: Speaker) -> np.ndarray:
    """Speak any text: samples (L,) as `say` gives them, without phones, since foreign words have phones of their own.

    Raises:
        ImportError, ValueError: as `synthesise`.
    """
    return _speak(text, speaker.voice, speaker.speaking_rate_wpm, speaker.pitch)[0]


def phone_string(phones: Sequence[Phone]) -> tuple[str, ...]:
    """List the phones in order, without silences and timings."""
    return tuple(symbol for symbol, _, _ in phones if symbol != SILENCE)


def _speak(text: str, voice: Voice, rate_wpm: int, pitch: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Make samples (L,) with silence before and after, and the library's (sample position, symbol) of every phone."""
    if not text.strip():
        raise ValueError("text to speak is empty")
    _check_range("speaking_rate_wpm", rate_wpm, LOWEST_RATE_WPM, HIGHEST_RATE_WPM)
    _check_range("pitch", pitch, LOWEST_PITCH, HIGHEST_PITCH)
    with _lock:
        raw, events = _run_library(text, voice, rate_wpm, pitch)
    lead = np.zeros(round(LEAD_SECONDS * SAMPLE_RATE_HZ), np.float32)
    return np.concatenate([lead, _level(_resample(raw)), lead]), events


def _check_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be from {lowest} to {highest}, got {value}")


def _loader():
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "the synthetic corpus speaks with eSpeak NG, and the package 'espeakng_loader' is not installed; "
            f"install it with: {install_line('demo')}"
        ) from error
    return espeakng_loader


def _run_library(text: str, voice: Voice, rate_wpm: int, pitch: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Make int16 samples at the synthesiser's rate, and (sample position, symbol) of every phone."""
    loader = _loader()
    _check_variant(voice, Path(loader.get_data_path()))
    library = ctypes.CDLL(loader.get_library_path())
    chunks: list[np.ndarray] = []
    events: list[tuple[int, str]] = []

    @_SynthCallback
    def receive(wave, num_samples, event) -> int:
        if wave and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(wave, (num_samples,)).copy())
        index = 0
        while event[index].type != _EVENT_END_OF_LIST:
            if event[index].type == _EVENT_PHONEME:
                symbol = bytes(event[index].id.string).split(b"\0")[0].decode()
                events.append((event[index].sample, symbol))
            index += 1
        return 0

    try:
        data = loader.get_data_path().encode()
        rate_hz = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _PHONEME_EVENTS_IPA_DONT_EXIT)
        if rate_hz != _SYNTHESISER_RATE_HZ:
            raise RuntimeError(f"eSpeak NG started with {rate_hz}, expected a sample rate of {_SYNTHESISER_RATE_HZ} Hz")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(receive)
        if library.espeak_SetVoiceByName(str(voice).encode()) != 0:
            raise ValueError(f"the synthesiser has no accent {voice.accent!r}; see mllm.synthetic.speech.voices.VOICES")
        library.espeak_SetParameter(_PARAMETER_RATE, rate_wpm, 0)
        library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        encoded = text.encode() + b"\0"
        library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        library.espeak_Terminate()
    finally:
        _unload(library)
    if not chunks:
        raise ValueError(f"the synthesiser has nothing to say for {text!r}")
    return np.concatenate(chunks), events


def _check_variant(voice: Voice, data_path: Path) -> None:
    """Refuse unknown variants: the library would speak them in its plain voice, which is no held-out voice."""
    if not (data_path / "voices" / "!v" / voice.variant).is_file():
        raise ValueError(
            f"the synthesiser has no voice variant {voice.variant!r}; see mllm.synthetic.speech.voices.VOICES"
        )


def _unload(library: ctypes.CDLL) -> None:
    import _ctypes

    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
    else:
        _ctypes.dlclose(library._handle)


def _resample(raw: np.ndarray) -> np.ndarray:
    up, down = SAMPLE_RATE_HZ // 50, _SYNTHESISER_RATE_HZ // 50
    return resample_poly(raw.astype(np.float32), up, down, window=_low_pass(down))


@cache
def _low_pass(down: int) -> np.ndarray:
    """Make the filter that `resample_poly` would design anew in every call, which takes longer than to apply it."""
    num_taps = 20 * down + 1
    ideal = np.sinc((np.arange(num_taps) - 10 * down) / down) * np.kaiser(num_taps, 5.0)
    return (ideal / ideal.sum()).astype(np.float32)


def _level(samples: np.ndarray) -> np.ndarray:
    return (samples * (LEVEL_RMS / np.sqrt(np.mean(samples**2)))).astype(np.float32)


def _intervals(events: list[tuple[int, str]], seconds: float) -> tuple[Phone, ...]:
    """Let each phone last until the next starts; split a symbol for several evenly; fill the ends with silence."""
    starts = [LEAD_SECONDS + position / _SYNTHESISER_RATE_HZ for position, _ in events]
    last_end = seconds - LEAD_SECONDS
    timed: list[Phone] = [(SILENCE, 0.0, starts[0] if starts else seconds)]
    bounds_seconds = _with_room_for_final_l(events, [*starts, last_end])
    for (_, symbol), (start, end) in zip(events, pairwise(bounds_seconds), strict=True):
        names = phones_of_ipa(symbol)
        bounds = np.linspace(start, end, len(names) + 1)
        timed.extend((name, float(a), float(b)) for name, (a, b) in zip(names, pairwise(bounds), strict=True))
    if starts:
        timed.append((SILENCE, last_end, seconds))
    return _merge_silences([phone for phone in timed if phone[2] > phone[1]])


def _with_room_for_final_l(events: list[tuple[int, str]], bounds_seconds: list[float]) -> list[float]:
    """Give a third of the audio to a final "l": it and the vowel before it are reported as one, and the "l" of no
    length."""
    roomy = list(bounds_seconds)
    for index, (_, symbol) in enumerate(events):
        if symbol == "l" and index and bounds_seconds[index] == bounds_seconds[index + 1]:
            roomy[index] -= (bounds_seconds[index] - bounds_seconds[index - 1]) / 3
    return roomy


def _merge_silences(timed: list[Phone]) -> tuple[Phone, ...]:
    merged: list[Phone] = []
    for symbol, start, end in timed:
        if merged and symbol == merged[-1][0] == SILENCE:
            merged[-1] = (SILENCE, merged[-1][1], end)
        else:
            merged.append((symbol, start, end))
    return tuple(merged)
