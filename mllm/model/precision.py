"""Decides which dtype every part of a model is kept and computed in: the one place that does.

Knows dtypes of weights. Does not know media, budgets or devices.

    media ── encoder ── features ── compressor ── soft tokens ──┐
             as named               float32                     ├── LLM, as named; its adapters, float32
                                    rows of new tokens, newline ┘
                                    float32

`model.dtype` and `--dtype` name the dtype of what is frozen. What is added to it (compressors, newline, rows of new
tokens, adapters) is kept in float32 always: it is small, it trains, and small steps are lost in bfloat16. A whole part
that trains (`train.parts` names it) is in float32 while it trains and as named afterwards.

What passes from one part to the next takes on the dtype of the weights that read it, once, where it arrives: media
values and features in `ElasticModel.encode`, soft tokens and newline in `mllm.model.splice`, rows of new tokens in
`mllm.model.new_tokens`. An adapter takes and gives what the layer beside it does. So generation, evaluation, projector
fits and feature caches need no autocast. Training in bfloat16 (`train.precision`) has one, around all of this: its
products are in bfloat16, whatever the weights are in.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
}
"""The dtypes that frozen parts can have, by every name they go by."""


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Read a dtype, from torch or by its name.

    Raises:
        ValueError: another one.
    """
    known = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if known not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    assert known is not None
    return known


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a part's weights; float32 where it has none."""
    # An adapter inside a frozen part stands behind the part's first layers.
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


def as_weights_of(module: nn.Module, values: Tensor) -> Tensor:
    """Return values in the dtype of the weights that are going to read them."""
    return values.to(dtype_of(module))


def keep_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Turn parameters into float32 in place; DeepSpeed sees to those that ZeRO-3 has sharded."""
    for parameter in parameters:
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
