"""`mllm convert llama-avsr` turns a released Llama-AVSR into a run folder."""

from mllm.commands.convert_avsr import Settings, convert

SUMMARY = "Read a released Llama-AVSR (.pt, .pth, .ckpt or .safetensors) and write it as a run folder."
POSITIONAL = "file"
__all__ = ["POSITIONAL", "SUMMARY", "Settings", "run"]


def run(settings: Settings) -> int:
    """Convert, and report what was found."""
    return convert(settings, "llama-avsr")
