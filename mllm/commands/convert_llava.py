"""`mllm convert llava` turns a released LLaVA-1.5 into a run folder; MQT-LLaVA and M3 share its options.

Knows options and the terminal. Does not know names in checkpoints.
"""

from dataclasses import dataclass

from mllm.convert.llava_options import SYSTEMS, Options

SUMMARY = "Read a released LLaVA-1.5 (a folder as downloaded, or one file) and write it as a run folder."
POSITIONAL = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Convert a released checkpoint to a run folder; nothing in its files is run."""

    checkpoint: str
    """Folder as downloaded, a file (.bin, .pt, .safetensors), or what a first stage trained (query_abstractor.bin,
    mm_projector.bin)."""
    out: str
    """Folder to write; new or empty."""


def run(settings: Settings) -> int:
    """Convert, and report what was found."""
    return convert_system(settings, "llava")


def convert_system(settings: Settings, system: str) -> int:
    """Convert a checkpoint of a system, and report what was found."""
    from mllm.commands.terminal import quiet_loading, show_conversion
    from mllm.convert.llava import convert

    quiet_loading()
    facts = convert(settings.checkpoint, settings.out, system=system, options=settings)
    show_conversion(SYSTEMS[system].title, facts, settings.out)
    return 0
