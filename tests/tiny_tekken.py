"""A small tekken file with audio, as mistral-common reads it and Voxtral's folders on hubs hold it."""

import base64
import json
from pathlib import Path
from typing import Any

import transformers as hf

SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", *(f"<SPECIAL_{n}>" for n in range(20, 24))),
    *("[AUDIO]", "[BEGIN_AUDIO]", *(f"<SPECIAL_{n}>" for n in range(26, 34)), "[TRANSCRIBE]"),
)
"""By their ids, of which Voxtral's processor knows that of [AUDIO]."""
AUDIO_ID = SPECIAL.index("[AUDIO]")
MERGED = ("th", "is", "wh", "at", " t", " th", "this", " this", "what", "ä", "  ")
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tekken(version: str = "v7", *, with_audio: bool = True) -> dict[str, Any]:
    """The contents of a tekken file: bytes and a few merged pieces behind the special tokens."""
    pieces = [bytes([number]) for number in range(256)] + [piece.encode() for piece in MERGED]
    sizes = {"num_vocab_tokens": len(pieces), "default_vocab_size": len(pieces) + len(SPECIAL)}
    audio = {
        **{"sampling_rate": 16_000, "frame_rate": 12.5, "chunk_length_s": 30.0},
        "audio_encoding_config": {"num_mel_bins": 80, "hop_length": 160, "window_size": 400},
    }
    return {
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIAL)
        ],
        "config": {"pattern": PATTERN, "version": version, "default_num_special_tokens": len(SPECIAL), **sizes},
        **({"audio": audio} if with_audio else {}),
    }


class TekkenProcessor:
    """Saves what a hub has of a Voxtral's processor: a feature extractor and a tekken file."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both."""
        hf.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
        (Path(folder) / "tekken.json").write_text(json.dumps(tekken()))
