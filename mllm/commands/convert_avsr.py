"""Holds what `mllm convert omni-avsr`, `llama-avsr` and `llama-mtsk` share: the options and the conversion itself.

Knows options and the terminal. Does not know names in checkpoints.
"""

from dataclasses import dataclass

from mllm.convert.avsr_options import SYSTEMS, Options


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Convert a released checkpoint to a run folder; nothing in the file is run."""

    file: str
    """Released file: .pt, .pth, .ckpt or .safetensors."""
    out: str
    """Folder to write; new or empty."""


def convert(settings: Settings, system: str) -> int:
    """Convert a checkpoint of a system, and report what was found."""
    from mllm.commands.terminal import quiet_loading, show_conversion
    from mllm.convert.avsr import convert_file

    quiet_loading()
    facts = convert_file(settings.file, settings.out, system=system, options=settings)
    show_conversion(SYSTEMS[system].title, facts, settings.out)
    return 0
