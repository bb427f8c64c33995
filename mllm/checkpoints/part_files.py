"""Reads the tensors of a part out of the files of its checkpoint, by the part's own names, when they are used.

Knows safetensors and GGUF files, and which names in them are a part's. Does not know what a part computes.

    mapped    the file's own pages: nothing is in memory until it is used, and all processes share it
    read      memory of its own, past the map: what is rounded or added to is read so, since the pages of the file that
              were used would count as this process's memory until the file is closed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mllm.checkpoints.deferred import DeferredWeights
from mllm.checkpoints.families import Layout
from mllm.checkpoints.tensor_files import read_tensor

NAMED_TENSORS = 4
"""How many tensors of each kind a message names before it counts the others."""


class TensorFile(Protocol):
    """Says what is asked of an open file of tensors, whatever its format."""

    def names(self) -> list[str]:
        """List the names of all tensors."""
        ...

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        ...

    def mapped(self, name: str) -> Tensor:
        """Return a tensor whose values stay in the file until they are used, where the format allows it."""
        ...

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        ...


class SafetensorsFile:
    """Holds a safetensors file open.

    Raises:
        ValueError: it is no safetensors file, or is cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or is cut: {error}") from error

    def names(self) -> list[str]:
        """List the names of all tensors."""
        return list(self._file.keys())

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def mapped(self, name: str) -> Tensor:
        """Return a tensor whose values stay in the file until they are used."""
        return self._file.get_tensor(name)

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        return read_tensor(self.path, name)


@dataclass(frozen=True)
class StoredTensor:
    """Stands for a tensor in a file where transformers loads one, as slices of safetensors do.

    The library first takes all of it (`[...]`), and then says where and in which dtype it wants it.

    Args:
        weights: of the block that the tensor is loaded in; it is then not read at all.
    """

    file: TensorFile
    name: str
    weights: DeferredWeights | None = None

    def __getitem__(self, index: Any) -> "StoredTensor":
        assert index is Ellipsis
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor; it is the file's own pages where the dtype is that of the file."""
        if self.weights is None:
            mapped = self.file.mapped(self.name)
            if dtype is None or mapped.dtype == dtype:
                return mapped.to(device=device)
        assert dtype is not None
        return self.read(dtype).to(device=device)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor in memory of its own; what stands for it where weights are not read yet."""
        if self.weights is None:
            return self.file.read(self.name).to(dtype)
        return self.weights.stand_in(self.file.shape_of(self.name), dtype, lambda: self.file.read(self.name).to(dtype))


class Part:
    """Finds the tensors of a part in the open files of a checkpoint, and reads them from the disk when they are used.

    Raises:
        ValueError: two tensors of one name.
    """

    def __init__(self, reference: str, files: Sequence[TensorFile], layout: Layout) -> None:
        self.reference, self.layout = reference, layout
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for opened in files:
            for name in opened.names():
                part_name = layout.name_in_part(name)
                if part_name in self._places:
                    raise ValueError(
                        f"{reference} holds {part_name} twice: as {self._places[part_name][1]} and as {name}"
                    )
                if part_name is not None:
                    self._places[part_name] = opened, name

    def shapes(self) -> dict[str, Tensor]:
        """Return tensors without values, by name."""
        return {
            part_name: torch.empty(opened.shape_of(name), device="meta")
            for part_name, (opened, name) in self._places.items()
        }

    def tensors(self) -> dict[str, Any]:
        """Return the tensors by name, as transformers loads them: each is read, or mapped, when its turn comes."""
        if is_deepspeed_zero3_enabled():  # which copies from tensors alone, one after the other
            return {part_name: opened.mapped(name) for part_name, (opened, name) in self._places.items()}
        weights = DeferredWeights.current()
        return {part_name: StoredTensor(opened, name, weights) for part_name, (opened, name) in self._places.items()}

    def check(self, report: Mapping[str, Any]) -> None:
        """Refuse what transformers reports of a load.

        Raises:
            ValueError: tensors that are missing, unexpected or of another shape, by their names in the file.
        """
        problems = []
        for what in ("missing", "unexpected"):
            names = sorted(set(report[f"{what}_keys"]) - set(self.layout.unread))
            problems += _some([self._file_name(name) for name in names], what)
        shapes = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in report["mismatched_keys"])
        problems += _some(
            [f"{self._file_name(name)} has shape {stored}, the model has {wanted}" for name, stored, wanted in shapes]
        )
        if problems:
            raise ValueError(f"the weights in {self.reference} are not those of its config: {'; '.join(problems)}")

    def _file_name(self, part_name: str) -> str:
        """Return the name of a tensor in the files, or what it would be there; converted ones go by the model's."""
        if part_name in self._places:
            return self._places[part_name][1]
        names = [name for _, name in self._places.values()]
        for start, replaced in self.layout.renamed:
            if start and part_name.startswith(replaced) and any(name.startswith(start) for name in names):
                return start + part_name.removeprefix(replaced)
        return part_name

    def check_ties(self, model: PreTrainedModel) -> None:
        """Refuse values of their own for tensors that the config says are one, such as head and embeddings."""
        for name, source in model.all_tied_weights_keys.items():
            if not {name, source} <= self._places.keys():
                continue
            one, other = (opened.mapped(held) for opened, held in (self._places[name], self._places[source]))
            if not torch.equal(one, other):
                raise ValueError(
                    f"{self.reference} holds {name} and {source} with different values, but its config says they are "
                    "one (tie_word_embeddings)"
                )


def _some(names: list[str], what: str = "") -> list[str]:
    """Name the first few of what is wrong, and count the rest."""
    more = [f"and {len(names) - NAMED_TENSORS} more"] if len(names) > NAMED_TENSORS else []
    shown = ", ".join(names[:NAMED_TENSORS] + more)
    return [f"{what} {shown}".strip()] if names else []
