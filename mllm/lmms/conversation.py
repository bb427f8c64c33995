"""Translates what lmms-eval asks a chat model: conversations with their media decoded, and how to decode answers.

Knows the plain values that lmms-eval's tasks pass. Imports nothing of lmms-eval; does not know models or budgets.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mllm.data.manifest import Media, Message, Part, Sample, Text
from mllm.inference.answerer import Decoding
from mllm.media import Audio, MediaLoader, resample, to_rgb

DEFAULT_NEW_TOKENS = 1024
"""Most new tokens where a task names no `max_new_tokens`; lmms-eval's own chat models take as many."""
FOR_OTHERS = ("image_aspect_ratio",)
"""Arguments that some tasks carry for the preprocessing of one family of models; here the run decides that."""
ALLOWED = (
    *("max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k", "num_beams", "length_penalty"),
    *("repetition_penalty", "seed", *FOR_OTHERS),
)
MEDIA = ("image", "audio", "video")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """How to answer one request: how tokens are chosen, and the texts before which an answer is cut."""

    decoding: Decoding
    stops: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Cuts an answer before the first of the stops."""
        ends = [end for stop in self.stops if (end := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()


def read_generation(arguments: Mapping[str, Any], *, repeat: int = 0) -> Generation:
    """Reads the `generation_kwargs` of a task, as they stand after `--gen_kwargs`.

    Greedy, or beams, unless the task samples: that needs a `temperature` above 0 and no `do_sample: false`. `top_p` and
    `top_k` say nothing where nothing is sampled, and are refused where they would.

    Args:
        repeat: which answer to the same request this is; it changes the seed.

    Raises:
        ValueError: an argument that is not known here, or that asks for what this model does not do.
    """
    if unknown := sorted(set(arguments) - set(ALLOWED)):
        raise ValueError(f"generation argument {unknown[0]!r} is not known here; allowed: {', '.join(ALLOWED)}")
    for key in set(FOR_OTHERS) & set(arguments):
        _tell_once(key, str(arguments[key]))
    temperature = float(arguments.get("temperature") or 0.0)
    sampled = bool(arguments.get("do_sample", temperature > 0))
    if sampled and temperature == 0:
        sampled = "temperature" not in arguments  # tasks that write do_sample beside temperature 0 mean greedy
        temperature = 1.0
    if sampled:
        _refuse_unless(arguments, "top_p", (None, 1), "samples are drawn from the whole distribution")
        _refuse_unless(arguments, "top_k", (None, 0, -1), "samples are drawn from the whole distribution")
    _refuse_unless(arguments, "repetition_penalty", (None, 1), "there is no penalty on repetition")
    until = arguments.get("until") or ()
    decoding = Decoding(
        num_beams=int(arguments.get("num_beams") or 1),
        max_new_tokens=int(arguments.get("max_new_tokens", DEFAULT_NEW_TOKENS)),
        temperature=temperature if sampled else None,
        seed=int(arguments.get("seed") or 0) + repeat,
        length_penalty=float(arguments.get("length_penalty") or 1.0),
    )
    return Generation(decoding, tuple(filter(None, [until] if isinstance(until, str) else until)))


def _refuse_unless(arguments: Mapping[str, Any], key: str, allowed: tuple[Any, ...], why: str) -> None:
    if (value := arguments.get(key)) not in allowed:
        shown = ", ".join(str(one) for one in allowed if one is not None)
        raise ValueError(f"generation argument {key} is {value}; {why}, so it must be {shown} or left out")


@lru_cache
def _tell_once(key: str, value: str) -> None:
    logger.warning("generation argument %s=%s is for other models; the run's own preprocessing applies", key, value)


def read_conversation(
    name: str, messages: Sequence[Mapping[str, Any]], *, separator: str = ""
) -> tuple[Sample, list[tuple[str, Any]]]:
    """Reads a conversation in lmms-eval's form, a list of {role, content: [{type, text | url}, ...]}.

    Args:
        name: for messages.
        separator: put between a medium and a text after it that does not begin with it already.

    Returns:
        The sample, and medium and source of each of its media in order of appearance.

    Raises:
        ValueError: a part of another type, or one that is cut out of a longer video.
    """
    sources: list[tuple[str, Any]] = []
    turns = []
    for message in messages:
        content = message["content"]
        parts: list[Part] = []
        for raw_part in [content] if isinstance(content, str) else content:
            part = _read_part(raw_part, sources)
            after_medium = bool(parts) and isinstance(parts[-1], Media)
            if isinstance(part, Text) and after_medium and not part.text.startswith(separator):
                part = Text(f"{separator}{part.text}")
            parts.append(part)
        turns.append(Message(message["role"], tuple(parts)))
    return Sample(name, tuple(turns), task="generate"), sources


def _read_part(part: str | Mapping[str, Any], sources: list[tuple[str, Any]]) -> Part:
    if isinstance(part, str):
        return Text(part)
    if part["type"] == "text":
        return Text(part["text"])
    if part["type"] not in MEDIA:
        raise ValueError(f"a part of a message has the type {part['type']!r}; allowed: text, {', '.join(MEDIA)}")
    if part.get("start_time") is not None or part.get("end_time") is not None:
        raise ValueError("a part of a video, from start_time to end_time, cannot be read; whole files can")
    sources.append((part["type"], part["url"]))
    return Media(part["type"], "")


def read_medium(medium: str, source: Any, loader: MediaLoader) -> Any:
    """Decodes what a data set holds of one medium: a path, an image of Pillow's, or audio as samples and rate.

    Audio may be a mapping of `array` and `sampling_rate` or a decoder of torchcodec's; channels are averaged.

    Raises:
        MediaError: a file that is missing or cannot be read.
        ValueError: any other form.
    """
    if isinstance(source, str):
        return loader(medium, source)
    if medium == "image" and isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source))
    if medium == "audio" and (audio := _audio_of(source)) is not None:
        samples, rate_hz = audio
        channels = np.asarray(samples, dtype=np.float32)
        mono = channels if channels.ndim == 1 else channels.mean(axis=int(np.argmin(channels.shape)))
        return Audio(resample(mono, rate_hz, loader.sample_rate_hz), loader.sample_rate_hz)
    raise ValueError(f"{medium} comes as {type(source).__name__}, which is not read; give a path to a file")


def _audio_of(source: Any) -> tuple[Any, int] | None:
    if isinstance(source, Mapping) and {"array", "sampling_rate"} <= set(source):
        return source["array"], int(source["sampling_rate"])
    if (decode := getattr(source, "get_all_samples", None)) is not None:
        decoded = decode()
        return decoded.data.numpy(), int(decoded.sample_rate)
    return None
