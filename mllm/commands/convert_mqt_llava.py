"""`mllm convert mqt-llava` turns a released MQT-LLaVA into a run folder."""

from mllm.commands.convert_llava import POSITIONAL, Settings, convert_system

SUMMARY = "Read a released MQT-LLaVA (a folder as downloaded, or one file) and write it as a run folder."
__all__ = ["POSITIONAL", "SUMMARY", "Settings", "run"]


def run(settings: Settings) -> int:
    """Convert, and report what was found."""
    return convert_system(settings, "mqt-llava")
