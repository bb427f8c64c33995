"""Writes safetensors files that are as readable as every other file.

Knows files and permissions. Does not know what a tensor is for.

The safetensors library writes to a temporary file first, which only its owner may read, and leaves it so; a run folder
on a shared disk would then be of use to nobody else.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.checkpoints.sources import WEIGHTS, WEIGHTS_INDEX
from mllm.utils.fail_points import fail_point
from mllm.utils.files import writing

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 512 * 2**20
"""Of the files that a large model is written in, and of memory while it is."""


def write_tensors(tensors: Mapping[str, "Tensor"], path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file whose permissions are those that the user's umask gives.

    Raises:
        WriteError: the disk refuses it; the path, the bytes needed and those that are free are told.
    """
    from safetensors.torch import save_file

    with writing(path, num_bytes_of(tensors.values())):
        save_file(dict(tensors), path, metadata=metadata)
        Path(path).chmod(_usual_mode(Path(path)))


def read_tensor(path: str | Path, name: str) -> "Tensor":
    """Read one tensor of a safetensors file into memory of its own, and let go of the file."""
    from safetensors import safe_open

    # Not through a map of the file, whose pages would count as this process's memory until it is closed.
    with safe_open(path, framework="pt", backend="pread") as file:
        return file.get_tensor(name)


def num_bytes_of(tensors: "Iterable[Tensor]") -> int:
    """Count the bytes of the values of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_shards(
    sizes: Mapping[str, int], read: "Callable[[str], Tensor]", folder: Path, *, most_bytes: int | None = None
) -> None:
    """Write tensors as hubs hold a model, in one file or in several and an index, and hold one file's in memory.

    Args:
        sizes: bytes by name.
        read: gives a tensor of that name.
        most_bytes: of a file, unless a tensor alone is larger; `SHARD_BYTES` when left out.

    Raises:
        WriteError: as `write_tensors`.
    """
    most_bytes = most_bytes or SHARD_BYTES
    shards: list[list[str]] = [[]]
    for name, num_bytes in sizes.items():
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + num_bytes > most_bytes:
            shards.append([])
        shards[-1].append(name)
    holders = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(_gathered({name: sizes[name] for name in names}, read), folder / file, metadata={"format": "pt"})
        fail_point("weights.file")
        holders |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": holders}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _gathered(sizes: Mapping[str, int], read: "Callable[[str], Tensor]") -> dict[str, "Tensor"]:
    """Read tensors into one stretch of memory, which goes back to the system as a whole.

    Each by itself would leave holes between what else is in memory, which stay with the process.
    """
    import torch

    memory = torch.empty(sum(map(_aligned, sizes.values())), dtype=torch.uint8)
    tensors, start = {}, 0
    for name, num_bytes in sizes.items():
        tensor = read(name)
        place = memory[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
        tensors[name] = place.copy_(tensor)
        start += _aligned(num_bytes)
    return tensors


def _aligned(num_bytes: int) -> int:
    """Round up to where a number of any dtype may begin."""
    return -(-num_bytes // 16) * 16


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
