"""Folded position-key queries beside the unfolded forward, at several counts of soft tokens.

    python benchmarks/folded_queries.py [--repeats 15] [--threads 1] [--out-size 4096] [--device cpu]

The compressor has the sizes of MQT-LLaVA (256 queries, 24 x 24 patches of 1024, 16 heads) and random weights; the
out-size is the LLM's, 4096 for its 7B. The unfolded forward projects queries, keys and values, attends, and projects
twice, on the first n queries, as the released code does. Both run in this process on the same picture, in turns; their
outputs are compared first, and a difference above 1e-5 of the largest output stops the benchmark. Shown are medians and
the range of the middle half. Times are CPU time of the process, or wall time on a GPU. Folding itself, which happens
once, is timed apart.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import in_turns, options, seconds_of, spread

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.compressors import Query

COUNTS = (256, 144, 64, 16, 2)
PATCHES = 576


def build(out_size: int, device: torch.device, dtype: torch.dtype) -> Query:
    """The released sizes; every weight is random, the initial zeros too."""
    torch.manual_seed(0)
    query = Query(in_size=1024, out_size=out_size, query_grid=(16, 16), feature_grid=(24, 24), num_heads=16)
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return query.eval().to(device, dtype)


def runs_of(query: Query, pictures: Tensor, count: int) -> dict[str, Callable[[], Tensor]]:
    """The folded and the unfolded forward. With gradients asked for nothing is folded; none are kept for weights."""
    number = len(pictures)
    tokens = torch.full((number,), count, device=pictures.device)
    lengths = torch.full_like(tokens, PATCHES)

    def run() -> Tensor:
        return query(pictures, lengths, tokens=tokens, rates=torch.zeros_like(tokens), max_tokens=count)

    def unfolded() -> Tensor:
        with torch.enable_grad():
            return run()

    return {"unfolded": unfolded, "folded": torch.no_grad()(run)}


def milliseconds(seconds: list[float]) -> str:
    """Median and middle half."""
    return spread([1000 * value for value in seconds], digits=2)


def compare(given: argparse.Namespace) -> Table:
    """Equality first, then times in turns."""
    device = torch.device(given.device)
    query = build(given.out_size, device, getattr(torch, given.dtype))
    query.requires_grad_(False)  # so that the unfolded forward keeps nothing for a backward pass
    pictures = torch.randn(given.pictures, PATCHES, 1024, device=device, dtype=query.proj.dtype)
    with torch.no_grad():
        query._folds.get(tuple(query.parameters()), query._fold)  # the libraries' own first call
        folding = [seconds_of(query._fold, device) for _ in range(5)]
    table = Table(title=f"{given.pictures} pictures, ms per forward; folding itself takes {milliseconds(folding)}")
    for column in ("soft tokens", "unfolded", "folded", "times faster", "largest difference"):
        table.add_column(column, justify="right")
    for count in COUNTS:
        runs = runs_of(query, pictures, count)
        outputs = {name: run() for name, run in runs.items()}
        assert not torch.equal(outputs["folded"], outputs["unfolded"])
        off = float((outputs["folded"] - outputs["unfolded"]).abs().max() / outputs["unfolded"].abs().max())
        if off > (1e-5 if given.dtype == "float32" else 2e-2):
            raise SystemExit(f"{count} tokens: folded and unfolded differ by {off:.1e} of the largest output")
        times = in_turns({name: lambda _, run=run: run() for name, run in runs.items()}, given.repeats, device)
        ratio = statistics.median(times["unfolded"]) / statistics.median(times["folded"])
        table.add_row(str(count), *(milliseconds(times[name]) for name in runs), f"{ratio:.2f}", f"{off:.1e}")
    return table


def main() -> None:
    given = options(__doc__, 15, out_size=4096, pictures=1, with_device=True)
    Console(width=140).print(compare(given))


if __name__ == "__main__":
    main()
