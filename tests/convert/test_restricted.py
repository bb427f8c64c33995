"""Reading `.pt` files: tensors come out as they went in, and nothing in a file is ever run."""

import argparse
import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mllm.convert.av_hubert import convert_file
from mllm.convert.restricted import Inert, StoredTensor, plain, read_checkpoint
from mllm.convert.state_files import find_state, read_all

FIXTURES = Path(__file__).parent.parent / "fixtures" / "pt"
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
        values = read["model"][name].read()
        assert values.dtype == expected.dtype
        assert values.equal(expected.detach()), name


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


MAX_SECONDS, MAX_GROWTH_BYTES = 1.0, 64 * 2**20


def archive(path: Path, program: bytes, storage: bytes = b"") -> Path:
    """Write what `torch.save` writes, around a pickle of another making."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/data/0", storage)
    return path


def laughs(leaf: bytes, pair: bytes, num: int) -> bytes:
    """Return a pickle of containers that hold the one before twice, so that 2**num leaves are reached."""
    steps = b"".join(b"h%ch%c" % (n, n) + pair + b"q%c0" % (n + 1) for n in range(num))
    return leaf + b"q\x000" + steps + b"h%c" % num


TUPLES, LISTS = laughs(b")", b"\x86", 60), laughs(b"]", b"\x86\x85", 60)
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQK\x00"
HEAVY = {
    "bytes of 2**62": (b"\x80\x02\x8e" + (2**62).to_bytes(8, "little") + b".", "inside of 4611686018427387904 bytes"),
    "bytes of 2**32": (b"\x80\x02B" + (2**32 - 1).to_bytes(4, "little") + b".", "inside of 4294967295 bytes"),
    "a text of 2**32": (b"\x80\x02\x8d" + (2**32).to_bytes(8, "little") + b".", "inside of 4294967296 bytes"),
    "a frame of 2**62": (b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.", "inside of 4611686018427387904"),
    "a number of 2**31 bytes": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "inside of 2147483647 bytes"),
    "a key that holds itself over and over": (b"\x80\x02}" + TUPLES + b"Ns.", "a key of the type tuple"),
    "keys that do": (b"\x80\x02}(" + TUPLES + b"Nu.", "a key of the type tuple"),
    "a set that does": (b"\x80\x04(" + TUPLES + b"\x91.", "a key of the type tuple"),
    "ordered keys": (b"\x80\x02ccollections\nOrderedDict\n](" + TUPLES + b"N\x86e\x85R.", "a key of the type tuple"),
    "a storage of that kind": (b"\x80\x02(" + LISTS + b"NNNNtQ.", "something other than a storage"),
    "a shape of many axes": (b"\x80\x02" + TENSOR + b"(" + b"K\x01" * 99 + b"t)tR.", "a tensor without axes"),
    "an axis of 2**80": (
        b"\x80\x02" + TENSOR + b"\x8a\x0b" + b"\0" * 10 + b"\x01\x85K\x00\x85\x89NtR.",
        "a tensor of an impossible shape",
    ),
}


@pytest.mark.parametrize("what", HEAVY)
def test_a_small_file_that_asks_for_more_than_it_holds_is_refused_at_once(tmp_path: Path, what: str) -> None:
    program, message = HEAVY[what]
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"x\.pt is no checkpoint of torch.save, or is cut: .*{message}"):
        read_checkpoint(archive(tmp_path / "x.pt", program, bytes(16)))
    check_was_cheap(start, before)


def check_was_cheap(start_seconds: float, before_kib: int) -> None:
    assert time.process_time() - start_seconds < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) * 1024 < MAX_GROWTH_BYTES


@pytest.mark.parametrize("numbers", [2**62, 10**9, 5])
def test_a_tensor_of_more_numbers_than_its_storage_is_refused(tmp_path: Path, numbers: int) -> None:
    """Strides of 0 make it fit; a copy would be as large as its shape says."""
    axis = b"\x8a\x08" + numbers.to_bytes(8, "little")
    program = b"\x80\x02}U\x01a" + TENSOR + axis + b"\x85K\x00\x85\x89NtRs."
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"a tensor of shape \({numbers},\) reaches beyond its 4 numbers"):
        read_all(find_state(archive(tmp_path / "x.pt", program, bytes(16))))
    check_was_cheap(start, before)


def test_tensors_that_share_numbers_are_read_unless_they_are_many_times_the_file(tmp_path: Path) -> None:
    shared = torch.arange(2_000.0)
    tied = read_all(find_state(write(tmp_path / "x.pt", {"embed": shared, "head": shared}, True)))
    assert tied["embed"].equal(shared)
    assert tied["head"].equal(shared)
    many = write(tmp_path / "y.pt", {str(number): shared for number in range(20)}, True)
    with pytest.raises(ValueError, match=r"y\.pt: its tensors share their numbers, and would be 160000 bytes"):
        read_all(find_state(many))


@pytest.mark.parametrize("nested", [LISTS, laughs(b"]", b"\x86", 60)])
def test_a_configuration_that_holds_itself_over_and_over_is_refused(tmp_path: Path, nested: bytes) -> None:
    read = read_checkpoint(archive(tmp_path / "x.pt", b"\x80\x02}U\x03cfg" + nested + b"s."))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the configuration in the file holds more than 50,000 values"):
        plain(read["cfg"])
    check_was_cheap(start, before)
    deep = read_checkpoint(archive(tmp_path / "x.pt", b"\x80\x02" + b"]" * 9_000 + b"a" * 8_999 + b"."))
    with pytest.raises(ValueError, match="nested too deeply"):
        plain(deep)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bigstride", r"a tensor of shape \(2,\) reaches beyond its 4 numbers"),
        ("binbytes8", "is no checkpoint of torch.save, or is cut: .* inside of 4611686018427387904 bytes"),
        ("laughs", "the configuration in the file holds more than 50,000 values"),
    ],
)
def test_small_files_that_asked_for_gigabytes_are_refused_within_a_second_and_64_mib(name: str, message: str) -> None:
    """They made converting AV-HuBERT take 3 and 4 GiB, and not end."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        read_all(find_state(FIXTURES / f"{name}.pt")) if name == "bigstride" else convert_file(FIXTURES / f"{name}.pt")
    check_was_cheap(start, before)


@pytest.mark.parametrize("where", ["anywhere", "structure"])
def test_a_damaged_archive_is_refused_or_holds_what_was_saved(tmp_path: Path, where: str) -> None:
    """One flipped bit each; without the check sums three of four such files are read with other numbers."""
    saved, rng = {"w": torch.randn(300), "b": torch.arange(5)}, random.Random(0)
    whole = write(tmp_path / "whole.pt", saved, True).read_bytes()
    directory = whole.index(b"PK\1\2")
    refused = 0
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[rng.randrange(directory if where == "structure" else 0, len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            read = read_all(find_state(tmp_path / "x.pt"))
        except ValueError as error:
            refused += "x.pt" in str(error)
        else:
            assert read.keys() == saved.keys()
            assert all(read[name].equal(value) for name, value in saved.items())
    assert refused > 60


def test_archives_without_check_sums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path / "x.pt", {"w": torch.ones(3)}, True)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_all(find_state(path))["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_pickle_of_more_values_than_anybody_saves_is_refused(tmp_path: Path) -> None:
    """Packed, it is small; its lists would take gigabytes."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02" + b"]" * (20 * 2**20) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="a pickle of more than 1,000,000 steps"):
        read_checkpoint(tmp_path / "x.pt")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 3 * MAX_GROWTH_BYTES


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    state = {"fine": torch.tensor([1.0, float("-inf")]), "bitten": torch.tensor([1.0, float("nan")])}
    path = tmp_path / f"x.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    with pytest.raises(ValueError, match=rf"x\.{suffix} is damaged, or its training was: bitten holds"):
        read_all(find_state(path))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int16", "uint64", "bool", "complex64", "float8_e8m0fnu"])
def test_every_type_of_numbers_is_found_and_read(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    stored = torch.ones(2, 3).to(dtype)
    save_file({"w": stored, "scalar": stored[0, 0].clone()}, tmp_path / "x.safetensors")
    weights = find_state(tmp_path / "x.safetensors")
    assert {name: (one.shape, one.num_bytes) for name, one in weights.items()} == {
        "w": ((2, 3), 6 * dtype.itemsize),
        "scalar": ((), dtype.itemsize),
    }
    read = weights["w"].read()
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), stored.view(torch.uint8))


def test_a_type_that_torch_does_not_know_is_refused_by_the_file(tmp_path: Path) -> None:
    head = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(3))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_all(find_state(tmp_path / "x.safetensors"))


def test_finding_weights_reads_no_numbers(tmp_path: Path) -> None:
    num_bytes = 2 * MAX_GROWTH_BYTES
    save_file({"w": torch.zeros(num_bytes, dtype=torch.uint8)}, tmp_path / "x.safetensors")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    assert find_state(tmp_path / "x.safetensors")["w"].num_bytes == num_bytes
    assert resident() - before < MAX_GROWTH_BYTES
