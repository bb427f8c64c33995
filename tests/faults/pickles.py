"""Files of `torch.save` that are not meant well: payloads in many wrappings, requests for gigabytes, and damage."""

import io
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from children import mutate

# What a payload calls, as module, name and arguments that it is called with.
CALLS = {
    "os.system": lambda canary: ("os", "system", (f"touch {canary}",)),
    "subprocess": lambda canary: ("subprocess", "call", (["touch", str(canary)],)),
    "eval": lambda canary: ("builtins", "eval", (f"open({str(canary)!r}, 'w')",)),
    "exec": lambda canary: ("builtins", "exec", (f"open({str(canary)!r}, 'w')",)),
    "open": lambda canary: ("io", "open", (str(canary), "w")),
    "importlib": lambda canary: ("runpy", "run_path", (str(canary),)),
    "torch.load": lambda canary: ("torch", "load", (str(canary),)),
    "getattr": lambda canary: ("builtins", "getattr", (canary, "touch")),
}
# A huge length, containers that hold each other, steps without end, a memo of two billion places.
HEAVY = [
    b"\x80\x02\x8e" + (2**62).to_bytes(8, "little") + b".",
    b"\x80\x02}r\xff\xff\xff\x7f.",
    b"\x80\x02" + b"]" * 2_000_000 + b".",
    b"\x80\x02" + b"(" * 500_000 + b".",
    b"\x80\x02]q\x00" + b"(h\x00h\x00h\x00l" * 200_000 + b".",
    b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
]


class Called:
    """Pickles as a call."""

    def __init__(self, call: tuple[str, str, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        module, name, arguments = self.call
        return _by_name(module, name), arguments


def _by_name(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(module), name)


def hostile_files(count: int, canary: Path, folder: Path, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents; none may touch the canary or raise anything but a ValueError when it is read."""
    good = _saved({"w": torch.randn(64), "b": torch.ones(3)}, is_archive=True)
    old = _saved({"w": torch.randn(64)}, is_archive=False)
    for number in range(count):
        kind = number % 5
        if number % 25 == 1:
            yield "heavy.pt", _archive(HEAVY[number // 25 % len(HEAVY)], packed=rng.random() < 0.5)
        elif kind == 0:
            name = sorted(CALLS)[number // 5 % len(CALLS)]
            value = Called(CALLS[name](canary))
            content = [{"w": value}, value, [value], {"state_dict": {"w": torch.ones(2), "x": value}}][number // 40 % 4]
            yield (
                f"{name}.{('pt', 'bin', 'ckpt', 'pth')[number // 10 % 4]}",
                _saved(content, is_archive=rng.random() < 0.5),
            )
        elif kind <= 2:
            yield "opcodes.pt", _archive(_random_program(rng), packed=False)
        else:
            yield "damaged.pt", mutate(good if kind == 3 else old, rng)


def _saved(value: Any, *, is_archive: bool) -> bytes:
    held = io.BytesIO()
    torch.save(value, held, _use_new_zipfile_serialization=is_archive)
    return held.getvalue()


def _archive(program: bytes, *, packed: bool) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", bytes(16))
    return held.getvalue()


def _random_program(rng: random.Random) -> bytes:
    """Opcodes in any order, half of them with what looks like an argument."""
    opcodes = [getattr(pickle, name) for name in dir(pickle) if isinstance(getattr(pickle, name), bytes)]
    opcodes = [opcode for opcode in opcodes if len(opcode) == 1]
    body = b"".join(
        rng.choice(opcodes) + (rng.randbytes(rng.randrange(6)) if rng.random() < 0.5 else b"") for _ in range(60)
    )
    return b"\x80\x02cos\nsystem\n(U\x02idtR" + body + b"."
