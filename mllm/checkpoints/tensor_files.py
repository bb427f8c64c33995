"""Writes safetensors files that are as readable as every other file.

Knows files and permissions. Does not know what a tensor is for.

The safetensors library writes to a temporary file first, which only its owner may read, and leaves it so; a run folder
on a shared disk would then be of use to nobody else.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.utils.files import writing

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(tensors: Mapping[str, "Tensor"], path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file whose permissions are those that the user's umask gives.

    Raises:
        WriteError: the disk refuses it; the path, the bytes needed and those that are free are told.
    """
    from safetensors.torch import save_file

    with writing(path, num_bytes_of(tensors.values())):
        save_file(dict(tensors), path, metadata=metadata)
        Path(path).chmod(_usual_mode(Path(path)))


def num_bytes_of(tensors: "Iterable[Tensor]") -> int:
    """Count the bytes of the values of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_model(model: Any, folder: str | Path, **options: Any) -> None:
    """Write a model of transformers as `save_pretrained` does, its weights as readable as its config.

    Args:
        options: of `save_pretrained`.

    Raises:
        WriteError: as `write_tensors`.
    """
    with writing(folder, num_bytes_of(model.parameters())):
        model.save_pretrained(folder, **options)
        for file in Path(folder).glob("*.safetensors"):
            file.chmod(_usual_mode(file))


def _usual_mode(path: Path) -> int:
    """Find which permissions a new file gets here; the umask itself can only be read by changing it for all threads."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()
