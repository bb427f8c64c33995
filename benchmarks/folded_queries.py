"""Times folded position-key queries beside the unfolded forward, at several counts of soft tokens.

    python benchmarks/folded_queries.py [--repeats 15] [--threads 1] [--out-size 4096] [--device cpu]

The compressor has the sizes of MQT-LLaVA (256 queries, 24 x 24 patches of 1024, 16 heads) and random weights; the
out-size is the LLM's, 4096 for its 7B. The unfolded forward projects queries, keys and values, attends, and projects
twice, on the first n queries, as the released code does (gordonhu608/MQT-LLaVA @92c35d0,
llava/model/multimodal_projector/builder.py:200-204). Both run in this process on the same image, in turns; their
outputs are compared first, and a difference above 1e-5 of the largest output stops the benchmark. Shown are medians and
the range of the middle half, and beside the ratio the one that FLOPs (`mllm/evaluation/flops.py`) predict. Times are
CPU time of the process, or wall time on a GPU. Folding itself, which happens once, is timed apart.
"""

import argparse
from collections.abc import Callable
from typing import Literal

import torch
from outcomes import Outcome, append, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import in_turns, milliseconds, options, ratio_of, seconds_of, unprepared

from mllm.compressors import Query
from mllm.config.medium import ImageConfig, ImageEncoderConfig, ImageQueryConfig
from mllm.evaluation.flops import Item, compressor_flops

COUNTS = (256, 144, 64, 16, 2)
GOALS = {256: 1.9, 16: 4.5}
PATCHES, IN_SIZE, NUM_HEADS = 576, 1024, 16


def build(out_size: int, device: torch.device, dtype: torch.dtype) -> Query:
    """Build a compressor of the released sizes; every weight is random, the initial zeros too."""
    torch.manual_seed(0)
    query = Query(in_size=IN_SIZE, out_size=out_size, query_grid=(16, 16), feature_grid=(24, 24), num_heads=NUM_HEADS)
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return query.eval().to(device, dtype)


def runs_of(query: Query, images: Tensor, count: int) -> dict[str, Callable[[], Tensor]]:
    """Make the folded and the unfolded forward. With gradients on nothing is folded; none are saved for weights."""
    number = len(images)
    tokens = torch.full((number,), count, device=images.device)
    lengths = torch.full_like(tokens, PATCHES)

    def run() -> Tensor:
        return query(images, lengths, tokens=tokens, rates=torch.zeros_like(tokens), max_tokens=count)

    def unfolded() -> Tensor:
        with torch.enable_grad():
            return run()

    return {"unfolded": unfolded, "folded": torch.no_grad()(run)}


def predicted(count: int, out_size: int) -> float:
    """Compute the ratio of FLOPs."""
    encoder = ImageEncoderConfig(source="random")

    def queries(keys: Literal["position", "content"]) -> ImageConfig:
        compressor = ImageQueryConfig(num_queries=256, num_heads=NUM_HEADS, keys=keys)
        return ImageConfig(encoder=encoder, compressor=compressor, budgets=list(COUNTS))

    item = Item("image", PATCHES, count)
    folded, unfolded = (
        # Keys that are never folded cost what position keys cost unfolded: one product per patch.
        compressor_flops(block, item, in_size=IN_SIZE, out_size=out_size)
        for block in (queries("position"), queries("content"))
    )
    return unfolded / folded


def compare(arguments: argparse.Namespace) -> tuple[Table, list[Outcome]]:
    """Check equality first, then time in turns."""
    device = torch.device(arguments.device)
    query = build(arguments.out_size, device, getattr(torch, arguments.dtype))
    query.requires_grad_(False)  # so that the unfolded forward keeps nothing for a backward pass
    images = torch.randn(arguments.images, PATCHES, IN_SIZE, device=device, dtype=query.proj.dtype)
    with torch.no_grad():
        query._folds.get(tuple(query.parameters()), query._fold)  # the libraries' own first call
        folding = [seconds_of(query._fold, device) for _ in range(5)]
    table = Table(title=f"{arguments.images} images, ms per forward; folding itself takes {milliseconds(folding)}")
    for column in ("soft tokens", "unfolded", "folded", "times faster", "FLOPs", "largest difference"):
        table.add_column(column, justify="right")
    outcomes = []
    for count in COUNTS:
        runs = runs_of(query, images, count)
        outputs = {name: run() for name, run in runs.items()}
        assert not torch.equal(outputs["folded"], outputs["unfolded"])
        off = float((outputs["folded"] - outputs["unfolded"]).abs().max() / outputs["unfolded"].abs().max())
        if off > (1e-5 if arguments.dtype == "float32" else 2e-2):
            raise SystemExit(f"{count} tokens: folded and unfolded differ by {off:.1e} of the largest output")
        times = in_turns(unprepared(runs), arguments.repeats, device)
        slow, fast = times["unfolded"], times["folded"]
        flops = predicted(count, arguments.out_size)
        cells = (milliseconds(slow), milliseconds(fast), f"{ratio_of(slow, fast):.2f}", f"{flops:.2f}", f"{off:.1e}")
        table.add_row(str(count), *cells)
        if count in GOALS:
            what, check = f"position-key queries folded, {count} tokens", f"outputs within {off:.0e} of the largest"
            outcomes.append(
                timed(what, "MQT-LLaVA's attention", slow, fast, check=check, predicted=flops, goal=GOALS[count])
            )
    return table, outcomes


def main() -> None:
    arguments = options(__doc__, 15, out_size=4096, images=1, with_device=True)
    table, outcomes = compare(arguments)
    Console(width=140).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
