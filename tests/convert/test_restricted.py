"""Reading `.pt` files: tensors come out as they went in, and nothing in a file is ever run."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.convert.restricted import Inert, StoredTensor, plain, read_checkpoint

FORMATS = [pytest.param(True, id="archive"), pytest.param(False, id="stream")]


def write(path: Path, content: Any, is_archive: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    return path


@pytest.mark.parametrize("is_archive", FORMATS)
def test_tensors_containers_and_numbers_come_out_as_they_went_in(tmp_path: Path, is_archive: bool) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "plain": base,
        "column": base[:, 2],  # a view: shares its storage, has a stride and an offset
        "turned": base.T,
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(2, 2).bfloat16(),
        "ids": torch.tensor([[1, -2]]),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    content = {"model": OrderedDict(tensors), "epoch": 3, "names": ["a", ("b", None)], "rate": 0.5}
    read = read_checkpoint(write(tmp_path / "x.pt", content, is_archive))
    assert {key: read[key] for key in ("epoch", "names", "rate")} == {
        key: content[key] for key in ("epoch", "names", "rate")
    }
    assert list(read["model"]) == list(tensors)
    for name, expected in tensors.items():
        found = read["model"][name].read()
        assert found.dtype == expected.dtype
        assert found.equal(expected.detach()), name


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


class Creeping:
    """Calls eval on a text, then sets an attribute on what came out."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.mark)!r}, 'w')",), {"__class__": "x"}


@pytest.mark.parametrize("is_archive", FORMATS)
@pytest.mark.parametrize("harm", [Harmful, Creeping])
def test_code_in_a_file_is_not_run(tmp_path: Path, is_archive: bool, harm: Any) -> None:
    mark = tmp_path / "was_run"
    path = write(tmp_path / "x.pt", {"model": {"w": torch.ones(2)}, "bad": harm(mark)}, is_archive)
    read = read_checkpoint(path)
    assert isinstance(read["bad"], Inert)
    assert read["bad"].name in ("posix.system", "builtins.eval", "__builtin__.eval")
    assert read["model"]["w"].read().tolist() == [1.0, 1.0]
    assert not mark.exists()


def test_the_functions_that_tensors_are_made_by_cannot_be_changed_by_a_file(tmp_path: Path) -> None:
    """`BUILD` sets attributes on whatever lies on the stack; ours have none."""
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", program)
    with pytest.raises(ValueError, match=r"is no checkpoint of torch.save, or is cut"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("is_archive", FORMATS)
def test_objects_of_other_packages_are_plain_values(tmp_path: Path, is_archive: bool) -> None:
    content = {"args": argparse.Namespace(layers=2, names=["a"], inner=argparse.Namespace(rate=0.1))}
    read = read_checkpoint(write(tmp_path / "x.pt", content, is_archive))
    assert isinstance(read["args"], Inert)
    assert plain(read) == {"args": {"layers": 2, "names": ["a"], "inner": {"rate": 0.1}}}


def test_containers_and_values_of_omegaconf_are_what_they_hold() -> None:
    def node(**state: Any) -> Inert:
        made = Inert()
        made.__setstate__(state)
        return made

    config = node(_metadata=Inert(), _parent=None, _content={"heads": node(_val=16, _parent=Inert()), "first": True})
    assert plain({"model": config}) == {"model": {"heads": 16, "first": True}}


@pytest.mark.parametrize("is_archive", FORMATS)
def test_a_file_that_is_cut_or_something_else_is_refused(tmp_path: Path, is_archive: bool) -> None:
    path = write(tmp_path / "x.pt", {"w": torch.randn(1000)}, is_archive)
    whole = path.read_bytes()
    for length in (len(whole) - 2000, 100, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.pt"):
            read_checkpoint(path)["w"].read()
    path.write_bytes(pickle.dumps({"no": "checkpoint"}))
    with pytest.raises(ValueError, match=r"x\.pt is no checkpoint of torch.save"):
        read_checkpoint(path)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    tensor = read_checkpoint(write(tmp_path / "x.pt", torch.zeros(4), True))
    wide = StoredTensor(tensor.storage, 0, (10**12,), (1,), tensor.extents)
    with pytest.raises(ValueError, match=r"a tensor of shape \(1000000000000,\) reaches beyond its 4 numbers"):
        wide.read()
    before = StoredTensor(tensor.storage, 3, (4,), (-1,), tensor.extents)
    with pytest.raises(ValueError, match="reaches beyond"):
        before.read()
