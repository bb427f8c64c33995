"""Weights and inputs of the golden files, rebuilt from names: whoever has a name and a shape has the values.

A value is drawn by a generator whose seed is the CRC-32 of the name. What it is scaled to follows from the name: norms
and slopes lie around one, biases and means around zero, variances above one half, matrices are divided by their fan-in.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """One golden file: `facts` from its JSON, `arrays` from its safetensors."""

    facts: dict[str, Any]
    arrays: dict[str, Tensor]

    @classmethod
    def read(cls, name: str) -> "Golden":
        return cls(json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors"))

    def array(self, name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """An input."""
        return torch.from_numpy(_normal(self.facts["salt"] + name, shape) * np.float32(scale))

    def state(self, layout: dict[str, list[int]]) -> dict[str, Tensor]:
        """A state dict with the names and shapes of a layout."""
        return {name: _weight(self.facts["salt"] + name, shape) for name, shape in layout.items()}


def _normal(name: str, shape: Sequence[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(tuple(shape)).astype(np.float32)


def _weight(name: str, shape: Sequence[int]) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    drawn = torch.from_numpy(_normal(name, shape))
    if kind == "running_var":
        return drawn.square() + 0.5
    if kind in ("bias", "running_mean"):
        return 0.1 * drawn
    if len(shape) == 1:
        return 1.0 + 0.1 * drawn
    return drawn / math.sqrt(math.prod(shape[1:]) or 1)
