"""Says in which type a CPU computes what may be computed in bfloat16."""

from functools import cache

import torch

BFLOAT16_ARITHMETIC = ("amx_bf16", "avx512_bf16")
"""What CPUs that multiply bfloat16 say of themselves."""


@cache
def _multiplies_bfloat16() -> bool:
    return any(torch.cpu.get_capabilities().get(name, False) for name in BFLOAT16_ARITHMETIC)


def cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what a CPU computes in: bfloat16 where it has arithmetic for it, float32 otherwise.

    Without it a product takes up to 80 times as long in bfloat16; with it half as long (docs/speed.md). It goes by what
    the CPU says and not by a stopwatch, so that a run on one machine always gives the same.
    """
    return dtype if dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32
