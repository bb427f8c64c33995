"""Answers eight rates of one utterance in one batch, beside one run of encoder and `generate` per rate.

    python benchmarks/budget_sweep.py [--repeats 3] [--threads 1] [--beams 1] [--new-tokens 25] [--device cpu]

The model is that of `beam_decoding.py`. The baseline does what the evaluation of Llama-MTSK and Omni-AVSR does
(umbertocappellazzo/Omni-AVSR @7de6be2, eval_OmniAVSR.py:310-337): for each configuration one whole pass, with batches
of one, in which the audio is encoded again. The sweep encodes once and decodes all rates as rows of one batch, as
`mllm evaluate` does. Both run in this process in turns; their ids are
compared first, and any difference stops the benchmark. Shown are medians and the range of the middle half, and beside
the ratio the one that FLOPs (`mllm/evaluation/flops.py`) predict, without and with the padding of the shorter prompts.
Decoding is bound by reading the weights, which FLOPs do not see. Times are CPU time of the process, or wall time on a
GPU.
"""

import argparse
from typing import Any

import torch
from beam_decoding import FRAMES_PER_SECOND, SECONDS, build_batch, build_model, library
from outcomes import Outcome, append, in_float32, timed
from rich.console import Console
from rich.table import Table
from turns import in_turns, options, ratio, spread, unprepared

from mllm.budget import Budget
from mllm.evaluation.flops import Item, request_cost

RATES = (4, 5, 6, 8, 10, 12, 16, 20)
GOAL = 3.0


def predicted(config: Any, arguments: argparse.Namespace, lengths: list[int]) -> tuple[float, float]:
    """Compute the ratios of FLOPs, of the prompts as they are and of prompts padded to the longest."""

    def cost(rate: int, length: int) -> Any:
        frames = SECONDS * FRAMES_PER_SECOND
        return request_cost(
            config,
            [Item("audio", frames, frames // rate)],
            num_prompt_tokens=length,
            num_new_tokens=arguments.new_tokens,
            num_beams=arguments.beams,
        )

    unpadded = [cost(rate, length) for rate, length in zip(RATES, lengths, strict=True)]
    padded = [cost(rate, max(lengths)) for rate in RATES]
    separate = sum(one.total for one in unpadded)
    ratios = [
        separate / (unpadded[0].encoder + sum(one.total - one.encoder for one in costs)) for costs in (unpadded, padded)
    ]
    return ratios[0], ratios[1]


def compare(arguments: argparse.Namespace) -> tuple[Table, list[Outcome]]:
    """Check equality first, then time in turns."""
    device = torch.device(arguments.device)
    model, processor = build_model(device, getattr(torch, arguments.dtype), RATES)
    batch = build_batch(processor, 1)
    budgets = [Budget.parse(f"audio=/{rate}") for rate in RATES]
    options: dict[str, Any] = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
    options |= {"do_sample": False, "num_beams": arguments.beams}

    def inputs_at(some: list[Budget]) -> dict[str, torch.Tensor]:
        inputs = processor.expand(batch, [[budget] for budget in some], left_padding=True).inputs
        return {key: value.to(device) for key, value in inputs.items()}

    def separate() -> list[list[int]]:
        ids = []
        for budget in budgets:
            inputs = inputs_at([budget])
            ids += library(model, inputs, options)[:, inputs["input_ids"].shape[1] :].tolist()
        return ids

    def sweep() -> list[list[int]]:
        inputs = inputs_at(budgets)
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    if arguments.dtype == "float32" and separate() != sweep():
        raise SystemExit("FAILED: the ids of the sweep differ from those of separate runs")
    lengths = inputs_at(budgets)["attention_mask"].sum(dim=1).tolist()
    times = in_turns(unprepared({"separate": separate, "sweep": sweep}), arguments.repeats, device)
    ways = predicted(model.config, arguments, lengths)
    size = f"{arguments.beams} beams, {arguments.new_tokens} new tokens"
    table = Table(title=f"{len(RATES)} rates of one {SECONDS}-second utterance, {size}")
    for column in ("separate runs s", "one batch s", "ids", "times faster", "FLOPs", "FLOPs with padding"):
        table.add_column(column, justify="right")
    cells = (*map(spread, times.values()), "equal", ratio(times["separate"], times["sweep"]))
    table.add_row(*cells, *(f"{way:.2f}" for way in ways))
    outcome = timed(
        f"sweep over {len(RATES)} audio rates, beams: {arguments.beams}",
        "a pass each, as Omni-AVSR's over its 8 pairs of task and rates",
        *times.values(),
        check=in_float32("ids equal", arguments.dtype),
        predicted=ways[1],
        goal=GOAL,
    )
    return table, [outcome]


def main() -> None:
    arguments = options(__doc__, 3, beams=1, new_tokens=25, with_device=True)
    table, outcomes = compare(arguments)
    Console(width=160).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
