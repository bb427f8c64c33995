"""Lists what published systems ask: by task about speech, and about a medium that data merely describe.

Knows tasks and media. Does not know formats or samples.
"""

from typing import Literal

Medium = Literal["image", "audio", "video"]

SPEECH_TASKS: dict[str, tuple[Medium, ...]] = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}
"""The media that each task of speech recognition reads."""
SPEECH_PROMPTS = {
    "asr": "Transcribe speech to text.",
    "vsr": "Transcribe video to text.",
    "avsr": "Transcribe speech and video to text.",
}
"""The prompts of Llama-AVSR and Omni-AVSR."""
CAPTION_PROMPTS = {
    "image": "Describe the image concisely.",
    "audio": SPEECH_PROMPTS["asr"],
    "video": "Describe the video concisely.",
}
"""What is asked where a pair of medium and text has no question; that of images is one of LLaVA's."""
