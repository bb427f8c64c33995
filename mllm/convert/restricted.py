"""Reads PyTorch's `.pt` files without running anything that is in them.

Such files are pickles, and a pickle is a program. This reader lets it build plain containers and descriptions of
tensors, nothing else: every class or function it names becomes an inert stand-in that holds its name and what it was to
be made from. So a file that says `os.system("...")` yields an object called "os.system", and nothing happens.
Tensors are read from the file when they are asked for; the optimizer's state, most of a checkpoint, never is.

A small file can also ask for more memory or time than there is: bytes of a length it does not hold, tensors of more
numbers than their storage, containers that hold each other over and over, more of them than anybody saves. Each is
refused before it is made. Numbers that a disk or a network changed are refused by the check sums that an archive has of
them; the old format has none.

Knows both formats of `torch.save`: the zip archive, and the stream that came before it (PyTorch 1.5 and older).
Does not know what a checkpoint is for.
"""

import errno
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import torch
from torch import Tensor

MAX_PROGRAM_BYTES = 32 * 2**20
"""Of a pickle: what is in a file beside the numbers of its tensors."""
MAX_STEPS = 1_000_000
"""Of a pickle, each of which makes one value at most; those of thousands of tensors take some hundred thousand."""
MAX_VALUES = 50_000
"""Of a configuration, each counted as often as it is reached."""
MAX_AXES = 64
MAX_SHARING = 8
"""How many times as large as their file tensors may be; tied weights are there once and read twice."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_KEYS = (str, bytes, int, float, bool, type(None))
_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stands for an object that was not built: `name` of its class, `arguments`, `state` and `items` it was to get."""

    name = ""
    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *arguments: Any) -> "Inert":
        made = object.__new__(cls)
        made.arguments, made.state, made.items = arguments, None, []
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep what a list would be given."""
        self.items.append(value)


@dataclass(frozen=True)
class _Storage:
    """Says where the numbers of one or more tensors lie: `name` is a position in a legacy file, or an entry of an
    archive."""

    path: Path
    name: str
    dtype: torch.dtype
    size: int

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Extent:
    """Says where the bytes of a storage lie in its file, and their CRC-32 where the file has one."""

    start: int
    num_bytes: int
    check_sum: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    extents: Mapping[str, Extent]

    @property
    def num_bytes(self) -> int:
        """Count the bytes of its numbers."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def check(self) -> None:
        """Look whether its storage holds the tensor.

        Raises:
            ValueError: it reaches beyond, or has more numbers.
        """
        storage, num_elements = self.storage, math.prod(self.shape)
        reach = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1
        # Strides of 0 let few numbers stand for many; what is trained never looks so, and would be copied out in full.
        is_larger = num_elements > storage.size
        if self.offset < 0 or min((*self.stride, 0)) < 0 or is_larger or (num_elements and reach > storage.size):
            raise ValueError(
                f"{storage.path}: a tensor of shape {self.shape} reaches beyond its {storage.size} numbers"
            )

    def read(self) -> Tensor:
        """Read the tensor.

        Raises:
            ValueError: it reaches beyond what the file holds, or its numbers are not those that were saved.
        """
        self.check()
        storage = self.storage
        extent = self.extents.get(storage.name, Extent(0, 0))
        if extent.num_bytes != storage.num_bytes:
            raise ValueError(
                f"{storage.path}: {extent.num_bytes} bytes for {storage.name}, which should have {storage.num_bytes}"
            )
        if extent.start + extent.num_bytes > storage.path.stat().st_size:  # room for what is not there is never made
            raise ValueError(f"{storage.path} ends before the numbers of {storage.name} do")
        with storage.path.open("rb") as file:
            file.seek(extent.start)
            raw = bytearray(file.read(extent.num_bytes))
        if extent.check_sum is not None and zlib.crc32(raw) != extent.check_sum:
            raise ValueError(
                f"{storage.path} is damaged: the numbers of {storage.name} are not those that were saved (their CRC-32 "
                "differs)"
            )
        flat = torch.frombuffer(raw, dtype=storage.dtype) if raw else torch.zeros(0, dtype=storage.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone()


def read_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors of one file.

    Raises:
        ValueError: as `check_tensors`, or one that `StoredTensor.read` refuses.
    """
    check_tensors(tensors)
    return {name: tensor.read() for name, tensor in tensors.items()}


def check_tensors(tensors: Mapping[str, StoredTensor]) -> None:
    """Look whether the storages of one file hold its tensors.

    Raises:
        ValueError: one that `StoredTensor.check` refuses, or together they are many times as large as the file, which
            storages that several share can be.
    """
    for tensor in tensors.values():
        tensor.check()
    total = sum(tensor.num_bytes for tensor in tensors.values())
    if tensors and total > MAX_SHARING * (path := next(iter(tensors.values())).storage.path).stat().st_size:
        raise ValueError(f"{path}: its tensors share their numbers, and would be {total} bytes")


def read_checkpoint(path: str | Path) -> Any:
    """Read what a `.pt` file holds: containers, numbers, texts, `StoredTensor` and `Inert`.

    Raises:
        ValueError: no file of `torch.save`, one that is cut, or one that asks for what a reader cannot do.
    """
    path = Path(path)
    try:
        return _read_archive(path) if zipfile.is_zipfile(path) else _read_stream(path)
    except _BROKEN as error:
        raise ValueError(f"{path} is no checkpoint of torch.save, or is cut: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the beginning of the file
            raise
        raise ValueError(f"{path} is no checkpoint of torch.save, or is cut: {error}") from error


_BROKEN = (
    *(pickle.UnpicklingError, struct.error, zlib.error, zipfile.BadZipFile, EOFError),
    *(TypeError, LookupError, OverflowError, RuntimeError, MemoryError, UnicodeDecodeError),
)
"""What reading a damaged file raises; deep nesting and unknown methods of compression are kinds of RuntimeError."""


def plain(value: Any) -> Any:
    """Make a configuration plain containers: nodes of omegaconf and namespaces become the values they hold.

    Raises:
        ValueError: it holds more than `MAX_VALUES`, or is nested too deeply; containers may hold each other.
    """
    try:
        return _plain(value, iter(range(MAX_VALUES)))
    except RecursionError as error:
        raise ValueError("the configuration in the file is nested too deeply") from error


def _plain(value: Any, values_left: Iterator[int]) -> Any:
    if next(values_left, None) is None:
        raise ValueError(f"the configuration in the file holds more than {MAX_VALUES:,} values")
    if isinstance(value, Inert):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        if not isinstance(state, Mapping):
            pairs = dict(pair for pair in value.items if isinstance(pair, tuple) and isinstance(pair[0], str))
            return _plain(pairs, values_left) if value.items else value.name
        for key in ("_content", "_val"):  # a container of omegaconf, a value of omegaconf
            if key in state:
                return _plain(state[key], values_left)
        return _plain(state, values_left)
    if isinstance(value, Mapping):
        return {key: _plain(item, values_left) for key, item in value.items() if isinstance(key, str)}
    return [_plain(item, values_left) for item in value] if isinstance(value, list | tuple) else value


class _Tensor:
    """Takes the place of the functions that rebuild tensors. Without slots nothing can be set on it."""

    __slots__ = ()
    extents: Mapping[str, Extent]

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        if not all(isinstance(axes, tuple | list) and len(axes) <= MAX_AXES for axes in (shape, stride)):
            raise pickle.UnpicklingError("a tensor without axes")
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or not all(type(number) is int for number in numbers):
            raise pickle.UnpicklingError("a tensor without a storage")
        if len(shape) != len(stride) or not all(abs(number) < 2**63 for number in numbers):
            raise pickle.UnpicklingError("a tensor of an impossible shape")
        return StoredTensor(storage, offset, tuple(shape), tuple(stride), self.extents)


class _Parameter:
    """Takes the place of the function that makes a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _Entries(dict[Any, Any]):
    """Takes the place of ordered dictionaries; what torch hangs on a state dict beside its entries is left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Ordered:
    """Takes the place of the class of ordered dictionaries."""

    __slots__ = ()

    def __call__(self, pairs: Any = ()) -> _Entries:
        entries = _Entries()
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            _check_keys((key,))
            entries[key] = value
        return entries


class _Program:
    """Hands out the bytes of one pickle, never more than there are, whatever length is asked for.

    A read of a file makes room for what is asked for first, so a length of 2**62 in a pickle would end the process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._content = io.BytesIO(file.read(MAX_PROGRAM_BYTES))
        self.readline = self._content.readline
        self.tell = self._content.tell

    def read(self, size: int) -> bytes:
        content = self._content.read(size)
        if len(content) < size:
            raise EOFError(f"it ends, or is longer than {MAX_PROGRAM_BYTES} bytes, inside of {size} bytes")
        return content


class _Reader(pickle._Unpickler):
    """Builds containers and stand-ins; the only things it calls are those of this file.

    It is the unpickler that Python holds beside the one in C, which makes room for lengths and numbers of a file before
    it looks whether they are there, and cannot be told what may be a key: the hash of nested tuples takes for ever.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, path: Path, extents: Mapping[str, Extent]) -> None:
        self._file, self._start = file, file.tell()
        self.steps_left = MAX_STEPS
        self._program = _Program(file)
        super().__init__(self._program, encoding="utf-8")
        self.path = path
        self.num_bytes: dict[str, int] = {}  # of every storage that was referred to
        tensor = type("_PlacedTensor", (_Tensor,), {"__slots__": (), "extents": extents})()
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Ordered(),
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_parameter"): _Parameter(),
        }

    def load(self) -> Any:
        """Read one pickle and leave the file behind it.

        Raises:
            UnpicklingError: whatever is wrong with it.
        """
        try:
            content = super().load()
        except (EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError) as error:
            raise pickle.UnpicklingError(str(error)) from error
        self._file.seek(self._start + self._program.tell())
        return content

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in _STORAGE_TYPES:
            return _STORAGE_TYPES[global_name]
        key = (module_name, global_name)
        if key not in self.known:
            self.known[key] = type("Inert", (Inert,), {"name": f"{module_name}.{global_name}"})
        return self.known[key]

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, dtype, name, _, size = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(size) is not int or size < 0:
            raise pickle.UnpicklingError("a reference to something other than a storage")
        storage = _Storage(self.path, str(name), dtype, size)
        self.num_bytes[storage.name] = storage.num_bytes
        return storage


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if type(key) not in _KEYS and not (isinstance(key, Inert) or _is_flat(key)):
            raise pickle.UnpicklingError(f"a key of the type {type(key).__name__}")


def _is_flat(key: Any) -> bool:
    return type(key) is tuple and all(type(item) in _KEYS for item in key)


def _with_keys_checked(load: Any, step: int) -> Any:
    """Return what an opcode does behind a check of every `step`-th thing on top of the stack, which become keys."""

    def checked(reader: Any) -> None:
        _check_keys(reader.stack[-2:-1] if step == 0 else reader.stack[::step])
        load(reader)

    return checked


def _counted(load: Any) -> Any:
    """Return what an opcode does behind a count of all that were done."""

    def counted(reader: Any) -> None:
        reader.steps_left -= 1
        if reader.steps_left < 0:
            raise pickle.UnpicklingError(f"a pickle of more than {MAX_STEPS:,} steps")
        load(reader)

    return counted


_TAKING_KEYS = {pickle.SETITEM: 0, pickle.SETITEMS: 2, pickle.DICT: 2, pickle.ADDITEMS: 1, pickle.FROZENSET: 1}
_Reader.dispatch |= {
    opcode[0]: _with_keys_checked(_Reader.dispatch[opcode[0]], step) for opcode, step in _TAKING_KEYS.items()
}
_Reader.dispatch = {opcode: _counted(load) for opcode, load in _Reader.dispatch.items()}


def _read_archive(path: Path) -> Any:
    """Read the zip format: `data.pkl`, and one uncompressed entry per storage."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip archive, but none of torch.save: it holds {len(pickles)} data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        # torch.serialization.set_crc32_options(False) leaves 0 in all of them.
        has_check_sums = any(info.CRC for info in entries.values())
        program = entries[pickles[0]]
        if not has_check_sums:
            program.CRC = cast(Any, None)  # so that it is not compared
        extents: dict[str, Extent] = {}
        with archive.open(program) as file:
            reader = _Reader(io.BytesIO(file.read(MAX_PROGRAM_BYTES)), path, extents)
            content = reader.load()
    for name in reader.num_bytes:
        info = entries.get(f"{root}data/{name}")
        if info is not None and info.compress_type == zipfile.ZIP_STORED:
            check_sum = info.CRC if has_check_sums else None
            extents[name] = Extent(_start_of(path, info), info.file_size, check_sum)
    return content


def _start_of(path: Path, info: zipfile.ZipInfo) -> int:
    """Find where the bytes of an entry begin: behind its own header, whose last parts have lengths of their own."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"there is no {info.filename} where it should begin")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_bytes + extra_bytes


def _read_stream(path: Path) -> Any:
    """Read the old format: magic number, version, facts, the object, the names of the storages, and their bytes in
    turn."""
    extents: dict[str, Extent] = {}
    with path.open("rb") as file:
        magic, _, _ = (_Reader(file, path, {}).load() for _ in range(3))
        if magic != _LEGACY_MAGIC:
            raise ValueError(f"{path} is no checkpoint of torch.save")
        reader = _Reader(file, path, extents)
        content = reader.load()
        end = path.stat().st_size
        for name in _Reader(file, path, {}).load():
            file.seek(8, 1)  # the number of elements, which the reference has told already
            start, size = file.tell(), reader.num_bytes[name]
            if start + size > end:
                raise ValueError(f"{path} ends before the numbers of {name} do")
            extents[name] = Extent(start, size)
            file.seek(size, 1)
        return content
