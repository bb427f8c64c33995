"""Times greedy decoding with a LoRA beside the weights and with the same LoRA merged into them.

    python benchmarks/merged_adapter.py [--repeats 9] [--threads 1] [--new-tokens 24] [--device cpu]

The model is that of `grouped_questions.py`, asked without an image, with a LoRA of rank 16 on two or on all seven
linear layers. Both models answer in turns in this process; ids and logits are compared first, and other ids, or logits
that differ by more than 1e-4 of the largest, stop the benchmark. Shown are medians and the range of the middle half,
and beside the ratio the one that FLOPs (`mllm/evaluation/flops.py`) predict; what a decoding step saves are calls,
which FLOPs do not see. Times are CPU time of the process, or wall time on a GPU.
"""

import argparse
import copy
from functools import partial
from typing import Any

import torch
from grouped_questions import QUESTIONS, build_model
from outcomes import Outcome, append, in_float32, timed
from rich.console import Console
from rich.table import Table
from turns import in_turns, options, ratio, spread, unprepared

from mllm.checkpoints.load import merge_llm_adapter
from mllm.config.model import LoraConfig
from mllm.evaluation.flops import request_cost

TARGETS = {
    "q, v": ["q_proj", "v_proj"],
    "all seven": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def compare(arguments: argparse.Namespace) -> tuple[Table, list[Outcome]]:
    """Check equality first, then time in turns."""
    device = torch.device(arguments.device)
    table = Table(title=f"LoRA of rank 16, prompt and {arguments.new_tokens} new tokens: seconds")
    for column in ("on", "beside", "merged", "ids", "times faster", "FLOPs", "largest difference of logits"):
        table.add_column(column, justify="right")
    outcomes = []
    for name, targets in TARGETS.items():
        adapter = LoraConfig(rank=16, alpha=16, targets=targets)
        model, processor = build_model(device, getattr(torch, arguments.dtype), adapter=adapter)
        merged = copy.deepcopy(model)
        merge_llm_adapter(merged)
        inputs = {key: value.to(device) for key, value in processor(text=QUESTIONS[0]).items()}
        options = {"do_sample": False, "max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
        models: dict[str, Any] = {"beside": model, "merged": merged}
        ids = [one.generate(**inputs, **options).tolist() for one in models.values()]
        with torch.no_grad():
            beside, inside = (one(**inputs).logits for one in models.values())
        off = float((inside - beside).abs().max() / beside.abs().max())
        if arguments.dtype == "float32" and (ids[0] != ids[1] or off > 1e-4):
            raise SystemExit(f"{name}: a merged adapter gives other ids, or logits that differ by {off:.1e}")
        runs = {way: partial(one.generate, **inputs, **options) for way, one in models.items()}
        times = in_turns(unprepared(runs), arguments.repeats, device)
        length = inputs["input_ids"].shape[1]
        costs = [
            request_cost(one.config, [], num_prompt_tokens=length, num_new_tokens=arguments.new_tokens).total
            for one in models.values()
        ]
        speed, flops = ratio(times["beside"], times["merged"]), costs[0] / costs[1]
        table.add_row(name, *map(spread, times.values()), "equal", speed, f"{flops:.2f}", f"{off:.1e}")
        what = f"LoRA on {name}, merged"
        check = in_float32(f"ids equal, logits within {off:.0e}", arguments.dtype)
        outcomes.append(timed(what, "beside the weights", *times.values(), check=check, predicted=flops))
    return table, outcomes


def main() -> None:
    arguments = options(__doc__, 9, new_tokens=24, with_device=True)
    table, outcomes = compare(arguments)
    Console(width=140).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
