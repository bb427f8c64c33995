"""Weights that are too many for memory are written file by file, and read again as one model."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mllm.checkpoints.sources import WEIGHTS, WEIGHTS_INDEX, weight_files
from mllm.checkpoints.tensor_files import write_shards

SIZES = {"a": 400, "b": 400, "c": 1200, "d": 40}


def test_one_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor = torch.full((SIZES[name] // 4,), float(ord(name)))
        alive.append(weakref.ref(tensor))
        most = max(most, sum(one.nbytes for reference in alive if (one := reference()) is not None))
        return tensor

    write_shards(SIZES, read, tmp_path, most_bytes=1000)
    assert most == 1200  # of the one tensor that is larger than a file may be
    files = weight_files(tmp_path)
    assert [sorted(load_file(file)) for file in files] == [["a", "b"], ["c"], ["d"]]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: (tensor.nbytes, tensor[0].item()) for name, tensor in tensors.items()} == {
        name: (size, ord(name)) for name, size in SIZES.items()
    }
    assert json.loads((tmp_path / WEIGHTS_INDEX).read_text())["metadata"] == {"total_size": 2040}
    assert oct(files[0].stat().st_mode & 0o777) == oct((tmp_path / WEIGHTS_INDEX).stat().st_mode & 0o777)


@pytest.mark.parametrize("most_bytes", [2040, 10**9])
def test_what_fits_is_one_file(tmp_path: Path, most_bytes: int) -> None:
    write_shards(SIZES, lambda name: torch.zeros(SIZES[name] // 4), tmp_path, most_bytes=most_bytes)
    assert [file.name for file in weight_files(tmp_path)] == [WEIGHTS]
    assert not (tmp_path / WEIGHTS_INDEX).exists()
