"""`mllm convert omni-avsr` turns a released Omni-AVSR into a run folder."""

from mllm.commands.convert_avsr import Settings, convert

SUMMARY = "Read a released Omni-AVSR (.pt, .pth, .ckpt or .safetensors) and write it as a run folder."
POSITIONAL = "file"
__all__ = ["POSITIONAL", "SUMMARY", "Settings", "run"]


def run(settings: Settings) -> int:
    """Convert, and report what was found."""
    return convert(settings, "omni-avsr")
