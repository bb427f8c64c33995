"""Lists the files of a model that answers depend on, and digests them.

Knows names of files. Does not know what is in them.
"""

from collections.abc import Mapping
from pathlib import Path

from mllm.checkpoints.load import TRAINABLES
from mllm.utils.files import digest_of_file
from mllm.utils.run_paths import CONFIG, PROCESSOR, run_of

UNREAD_SUFFIXES = (".csv", ".jsonl", ".lock", ".log", ".md", ".png", ".yaml")
UNREAD_FILES = (
    "bench.json",
    "demo.json",
    "manifest.json",
    "optimizer.safetensors",
    "router.json",
    "router.safetensors",
    "trainer_state.json",
    "training.json",
)
"""Files beside a model that are not read to answer at a named budget: of its training, of demos, of measurements, and
its router."""


def fingerprint_of_model(folder: Path) -> dict[str, str]:
    """Digest every file of a run, a checkpoint or an exported model that loading it may read, by name.

    Raises:
        OSError: a file that cannot be read.
    """
    return {file.name: digest_of_file(file) for file in files_of_model(folder)}


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the names at which two fingerprints differ; one that either lacks is among them."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def files_of_model(folder: Path) -> list[Path]:
    """Lists the files of a run, a checkpoint or an exported model that loading it may read, by name.

    Frozen parts in other folders are named in config.json with their digests, which loading compares.
    """
    files = _read_in(folder)
    run = run_of(folder)
    if run != folder and not (folder / PROCESSOR).is_file():
        # A checkpoint is used with the processor of its run, whose finished model is another one.
        checkpoint_names = {CONFIG, TRAINABLES, *(file.name for file in files)}
        files += [file for file in _read_in(run) if file.name not in checkpoint_names]
    return sorted(files, key=lambda file: file.name)


def _read_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.suffix not in UNREAD_SUFFIXES and file.name not in UNREAD_FILES]
