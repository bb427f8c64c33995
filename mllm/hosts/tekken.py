"""Reads hosts whose prompts no template writes but the library mistral-common, out of the tekken file they come with.

Knows tekken files and mistral-common, which is asked where a host itself is read: for the layout of its prompts, as a
chat template, and for its own pipeline. Does not know models. A run on such a host has tokenizer and template of its
own and needs the library no more.
"""

import base64
import importlib.util
import io
from typing import Any

import numpy as np
import soundfile
from transformers import AutoProcessor, BatchFeature
from transformers.utils.hub import cached_file

from mllm.utils.extras import install_line

LIBRARY = "mistral_common"
TEKKEN_FILE = "tekken.json"
_PARTS, _OUR_PARTS = "'input_audio', 'audio_url'", "'audio', 'input_audio', 'audio_url'"
"""What the library's templates call audio in typed parts; transformers, and with it this project, calls it `audio`."""


def check_library() -> None:
    """Refuse to go on without mistral-common.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise ValueError(f"the prompts of this host are made by mistral-common: {install_line('voxtral')}")


def tekken_file(source: str) -> str:
    """Find the tekken file of a host.

    Args:
        source: folder or hub name.

    Raises:
        OSError: there is none.
    """
    path = cached_file(source, TEKKEN_FILE)
    assert path is not None  # it raises where there is none
    return path


def tekken_template(source: str) -> str:
    """Write the chat template of the prompts that mistral-common makes.

    Args:
        source: folder or hub name of a host.

    Raises:
        ValueError: mistral-common is not installed, cannot be used, or makes no prompts with audio of this file.
        OSError: there is no tekken file.
    """
    check_library()
    try:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    except ImportError as error:  # one that lacks a package, or that is too old to write templates
        raise ValueError(f"mistral-common cannot be used, {error}: {install_line('voxtral')}") from error

    path = tekken_file(source)
    try:
        template = convert_tokenizer_to_chat_template(path)
    except (MistralCommonException, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"mistral-common cannot read {path}: {error}") from error
    if _PARTS not in template:
        raise ValueError(f"mistral-common makes no prompts with audio of {path}")
    return template.replace(_PARTS, _OUR_PARTS)


def read_tekken_tokenizer(source: str) -> Any:
    """Read a tekken file as a fast tokenizer, which gives the ids that mistral-common gives.

    Args:
        source: folder or hub name of a host.

    Raises:
        OSError: there is no tekken file.
    """
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    tokenizer = convert_tekken_tokenizer(tekken_file(source), chat_template="")  # an empty one is none, and not sought
    tokenizer.chat_template = None
    return tokenizer


def tekken_inputs(source: str, samples: np.ndarray, rate_hz: int, question: str) -> BatchFeature:
    """Make the inputs of a question about a clip by the host's own pipeline, mistral-common included.

    The clip goes through a file in memory, as that pipeline wants, which holds the very samples.

    Args:
        source: folder or hub name of a host.
        samples: (L,) in float32.
    """
    check_library()
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV", subtype="FLOAT")
    audio = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    return processor.apply_chat_template([{"role": "user", "content": [audio, {"type": "text", "text": question}]}])
