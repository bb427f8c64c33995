"""`mllm convert llava-m3` turns a released LLaVA-1.5-M3 into a run folder."""

from mllm.commands.convert_llava import POSITIONAL, Settings, convert_system

SUMMARY = "Read a released LLaVA-1.5-M3 (a folder as downloaded, or one file) and write it as a run folder."
__all__ = ["POSITIONAL", "SUMMARY", "Settings", "run"]


def run(settings: Settings) -> int:
    """Convert, and report what was found."""
    return convert_system(settings, "llava-m3")
