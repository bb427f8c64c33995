"""Reads the variables of a model file that CTranslate2 wrote, version 6 of its format.

Knows bytes. Does not know which model they are of. Nothing is unpickled: the format is names, sizes and plain numbers.

    uint32 version | string specification | uint32 revision | uint32 number of variables
    per variable:  string name | uint8 rank | uint32 dimensions... | uint8 dtype | uint32 bytes | data
    uint32 number of aliases | per alias: string alias | string name

A string is uint16 bytes, the last of them zero.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

VERSION = 6
DTYPES: Mapping[int, np.dtype] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
"""The dtype that the number of a variable's type stands for; bfloat16 (5) is not read here."""


@dataclass(frozen=True)
class Variables:
    """Holds what a file does: the name of its specification, arrays by name, and other names of some of them."""

    specification: str
    arrays: Mapping[str, np.ndarray]
    aliases: Mapping[str, str]


def read_variables(data: bytes) -> Variables:
    """Read a whole model file; the arrays share its memory.

    Raises:
        ValueError: another version, an unknown dtype, sizes that contradict each other, or a file that is cut off or
            too long.
    """
    reader = _Reader(data)
    if (version := reader.number("I")) != VERSION:
        raise ValueError(f"the file is of version {version}; version {VERSION} is read")
    specification = reader.string()
    reader.number("I")  # the specification's revision says which names there are; the reader of the names checks them
    arrays = dict(reader.variable() for _ in range(reader.number("I")))
    aliases = {reader.string(): reader.string() for _ in range(reader.number("I"))}
    if reader.position != len(data):
        raise ValueError(f"the file has {len(data) - reader.position} bytes after its last alias")
    return Variables(specification, arrays, aliases)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> memoryview:
        """Take the next bytes."""
        if self.position + size > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)}, and {size} more from {self.position} are needed")
        taken = memoryview(self.data)[self.position : self.position + size]
        self.position += size
        return taken

    def number(self, code: str) -> int:
        """Read the next unsigned number of a `struct` code."""
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        """Read the next string, without its closing zero."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()

    def variable(self) -> tuple[str, np.ndarray]:
        """Read the next variable: its name and its values."""
        name = self.string()
        shape = tuple(self.number("I") for _ in range(self.number("B")))
        code, size = self.number("B"), self.number("I")
        if code not in DTYPES:
            raise ValueError(f"{name} has dtype {code}; allowed: {', '.join(map(str, DTYPES))}")
        values = np.frombuffer(self.take(size), DTYPES[code])
        if values.size != int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{name} has {values.size} values and shape {shape}")
        return name, values.reshape(shape)
