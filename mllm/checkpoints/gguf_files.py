"""Reads an LLM out of a GGUF file: its config, its tokenizer, and its weights as plain numbers.

Knows what transformers makes of such a file, and which of its tensors are left over. Does not know the model that wants
them; `pretrained.py` compares names and shapes.

    x.Q4_K_M.gguf ── metadata ── config, tokenizer with chat template
                  └─ blocks ──── one tensor after the other, dequantised and rounded to the dtype of the model

The 4 or 8 bits save disk alone: in memory weights are what they are in every other model. A quantised model in memory
is `model.quantization`.
"""

import copy
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from mllm.utils.extras import install_line

SPLIT_KEY = "split.count"
EXPERTS = "_exps"
SCALING_KEYS = (".rope.scaling.type", ".rope.scaling.factor")
"""Ends of the metadata that change positions, of which transformers reads nothing."""


def check_gguf(file: Path) -> Any:
    """Open a GGUF file, and refuse one that would be read wrongly or in part.

    Returns:
        The reader of the library `gguf`.

    Raises:
        ValueError: the library is missing; a file that is none, is one of several, scales positions, or holds a mixture
            of experts.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} is read with the library gguf: {install_line('gguf')}")
    facts = file.stat()
    reader = _reader(file, facts.st_size, facts.st_mtime_ns)
    if (split := reader.get_field(SPLIT_KEY)) is not None and split.contents() > 1:
        raise ValueError(f"{file} is one of {split.contents()} files; merge them with llama-gguf-split first")
    for key in reader.fields:
        value = reader.get_field(key).contents() if key.endswith(SCALING_KEYS) else None
        if value not in (None, "none", 1.0):
            raise ValueError(
                f"{file} scales positions ({key} is {value}), of which transformers reads nothing from a GGUF file; "
                "take the model as safetensors"
            )
    if any(EXPERTS in tensor.name for tensor in reader.tensors):
        raise ValueError(f"{file} holds a mixture of experts, which is not read from GGUF; take it as safetensors")
    return reader


@lru_cache(maxsize=2)
def _reader(file: Path, num_bytes: int, changed_ns: int) -> Any:
    """Open a file of this size and time; reading the metadata of a large vocabulary takes seconds, so once.

    Raises:
        ValueError: a file that is none.
    """
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is no GGUF file, or is cut: {error}") from error


def read_gguf_config(file: Path) -> PreTrainedConfig:
    """Read the config that the metadata of a GGUF file tells.

    Raises:
        ValueError: as `check_gguf`, or an architecture that transformers does not read.
    """
    check_gguf(file)
    facts = file.stat()
    return copy.deepcopy(_config(file, facts.st_size, facts.st_mtime_ns))


@lru_cache(maxsize=2)
def _config(file: Path, num_bytes: int, changed_ns: int) -> PreTrainedConfig:
    """Read the config of a file of this size and time, once, as `_reader`."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def read_gguf_tokenizer(file: Path, **options: Any) -> Any:
    """Read the tokenizer of a GGUF file, with its chat template; `options` are those of `AutoTokenizer`.

    Raises:
        ValueError: as `check_gguf`.
    """
    check_gguf(file)
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False, **options)


class GgufTensors:
    """Holds the tensors of an open GGUF file under the names that a model of transformers gives them.

    It is read as any other open file of tensors, see `mllm.checkpoints.part_files.TensorFile`.

    Args:
        file: the file.
        draft: a model of the class and config that wants them, without values.
        dtype: what they are rounded to.

    Raises:
        ValueError: as `check_gguf`; or tensors that transformers has no place for, by name.
    """

    def __init__(self, file: Path, draft: Any, dtype: torch.dtype) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        reader = check_gguf(file)
        architecture = reader.get_field("general.architecture").contents()
        self._file, self._dtype = file, dtype
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=draft.config.to_dict())
        self._names = get_gguf_hf_weights_map(draft, self._processor)
        self._stored = {self._names[one.name]: one for one in reader.tensors if one.name in self._names}
        if unread := sorted(one.name for one in reader.tensors if one.name not in self._names):
            raise ValueError(
                f"{file} holds {unread[0]}, which transformers has no place for in a {draft.config.model_type} "
                f"({len(unread)} of {len(reader.tensors)} tensors); take the model as safetensors"
            )

    def names(self) -> list[str]:
        """List the names of all tensors."""
        return list(self._stored)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(int(size) for size in reversed(self._stored[name].shape))

    def mapped(self, name: str) -> Tensor:
        """Dequantise a tensor, as `read`: its numbers are nowhere in the file."""
        return self.read(name)

    def read(self, name: str) -> Tensor:
        """Dequantise a tensor.

        Raises:
            ValueError: it is stored as what the library does not dequantise.
        """
        from gguf import dequantize

        stored = self._stored[name]
        try:
            numbers = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self._file} holds {stored.name} in a form that is not read: {error}") from error
        plain = self._processor.process(
            weights=numbers,
            name=stored.name,
            tensor_key_mapping=self._names,
            parsed_parameters={},
        )
        # What was not quantised is still the file's own pages, which nobody may write to.
        return torch.from_numpy(np.require(plain.weights, requirements=["C", "W"])).to(self._dtype)
