"""Reads the tensors of a released checkpoint by name, from the kinds of files that systems are released in.

Knows files. Does not know what the names mean. Nothing in a file is run.

What is as large as an LLM stays in its files (`StoredWeight`) until it is read, one tensor after the other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm.checkpoints.tensor_files import read_tensor, write_shards
from mllm.convert.restricted import Inert, StoredTensor, check_tensors, read_checkpoint

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
LIGHTNING_PREFIX = "model."
"""Lightning puts this before the names of the module it trains."""
INDEX_SUFFIX = ".index.json"
WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin")
"""The names that hubs give the weights of a model; with the suffix of an index where they lie in several files."""


@dataclass(frozen=True)
class StoredWeight:
    """A tensor that is still in its file.

    Args:
        shape: of the tensor.
        num_bytes: of its numbers.
        load: reads it, into memory of its own.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    num_bytes: int
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Read the tensor.

        Raises:
            ValueError: a damaged file, or one that holds what is no number; the tensor is named.
        """
        tensor = self.load()
        check_numbers(self.path, self.name, tensor)
        return tensor


def read_all(weights: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """Read tensors that were found into memory, by the same names.

    Raises:
        ValueError: as `StoredWeight.read`.
    """
    return {name: weight.read() for name, weight in weights.items()}


def write_stored(weights: Mapping[str, StoredWeight], folder: Path) -> None:
    """Write tensors as hubs hold a model, and hold one file's in memory; see `write_shards`.

    Raises:
        ValueError: as `StoredWeight.read`.
        WriteError: the disk refuses it.
    """
    sizes = {name: weight.num_bytes for name, weight in weights.items()}
    write_shards(sizes, lambda name: weights[name].read(), folder)


def find_weights(path: str | Path, names: Sequence[str] = WHOLE_MODELS) -> dict[str, StoredWeight]:
    """Find the tensors of a file, or of a folder as hubs keep them: one file, or several and an index of what is where.

    Args:
        names: of files looked for in a folder, the first found wins.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder without weights, an index that contradicts its files, or what `find_state` refuses.
    """
    path = Path(path)
    if not path.is_dir():
        return find_state(path)
    for name in names:
        if (index := path / f"{name}{INDEX_SUFFIX}").is_file():
            return _find_indexed(index)
        if (path / name).is_file():
            return find_state(path / name)
    raise ValueError(f"{path} holds no weights; looked for {', '.join(names)} and {names[0]}{INDEX_SUFFIX}")


def _find_indexed(index: Path) -> dict[str, StoredWeight]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} holds no weight_map of names and files")
    state: dict[str, StoredWeight] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which is no file beside it")
        tensors = find_state(index.parent / file)
        if wrong := sorted(tensors.keys() ^ {name for name, holder in files.items() if holder == file}):
            raise ValueError(f"{index.name} and {file} disagree about {wrong[0]} ({len(wrong)} in all)")
        state |= tensors
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def find_state(path: str | Path) -> dict[str, StoredWeight]:
    """Find the state dict in a file: one that was saved as such, or the `state_dict` of a Lightning checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, or an entry that is no tensor; it is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name} ends in {path.suffix or 'nothing'}; checkpoints end in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return _find_safetensors(path)
    content = read_checkpoint(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {_kind(content)} where a state dict is expected")
    if isinstance(content.get("state_dict"), Mapping):
        content = {name.removeprefix(LIGHTNING_PREFIX): entry for name, entry in content["state_dict"].items()}
    if not content:
        raise ValueError(f"{path} holds no tensors")
    for name, entry in content.items():
        if not isinstance(entry, StoredTensor):
            raise ValueError(
                f"{path} holds {_kind(entry)} at {name!r} where a tensor is expected; nothing of it was run"
            )
    check_tensors(content)
    return {name: StoredWeight(path, name, entry.shape, entry.num_bytes, entry.read) for name, entry in content.items()}


def _find_safetensors(path: Path) -> dict[str, StoredWeight]:
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)  # its numbers stay on the disk until they are used
                load = partial(read_tensor, path, name)
                state[name] = StoredWeight(path, name, tuple(tensor.shape), tensor.nbytes, load)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is cut: {error}") from error
    return state


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse weights that hold what is no number, which nothing trained leaves and every answer would become.

    Raises:
        ValueError: there is one in this tensor.
    """
    if tensor.is_floating_point() and tensor.isnan().any():
        raise ValueError(f"{path} is damaged, or its training was: {name} holds what is no number (NaN)")


def _kind(value: Any) -> str:
    return f"{value.name}()" if isinstance(value, Inert) else f"a {type(value).__name__}"


def check_layout(
    state: Mapping[str, Tensor] | Mapping[str, StoredWeight], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a state whose names or shapes are not those expected.

    Raises:
        ValueError: what is missing, unknown or of another shape, by name.
    """
    for problem, names in (
        ("misses", expected.keys() - state.keys()),
        ("holds unknown", state.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"the checkpoint {problem} {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name, shape in expected.items():
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(f"{name} has the shape {tuple(state[name].shape)} in the checkpoint; expected {shape}")
