"""Writes what the trainings of the LLM and of the vision encoder leave alike: a log of JSON objects, weights in
float16.

Knows files and versions. Does not know what is trained or how.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mllm.checkpoints.tensor_files import write_model


def header(model: nn.Module, **facts: Any) -> dict[str, Any]:
    """Make the first line of a log: facts of the run, and with what it was made."""
    return {
        **facts,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def write_line(log: TextIO, row: dict[str, Any]) -> None:
    """Append a line that can be read at once."""
    log.write(json.dumps(row) + "\n")
    log.flush()


def save_half(model: PreTrainedModel, out: Path, *, without: Collection[str] = ()) -> None:
    """Write weights in float16, but for some, and a config that says float32."""
    state = {name: value.half() for name, value in model.state_dict().items() if name not in without}
    write_model(model, out, state_dict=state)
    config = model.config.to_dict() | {"dtype": "float32"}  # stored in half, loaded in full precision for CPUs
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
