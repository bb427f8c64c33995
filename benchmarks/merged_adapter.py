"""Greedy decoding with a LoRA beside the weights and with the same LoRA merged into them.

    python benchmarks/merged_adapter.py [--repeats 9] [--threads 1] [--new-tokens 24] [--device cpu]

The model is that of `grouped_questions.py`, asked without a picture, with a LoRA of rank 16 on two or on all seven
linear layers. Both models answer in turns in this process; ids and logits are compared first, and other ids, or logits
that differ by more than 1e-4 of the largest, stop the benchmark. Shown are medians and the range of the middle half,
and beside the ratio the one that FLOPs (`mllm/cost.py`) predict; what a decoding step saves are calls, which FLOPs do
not see. Times are CPU time of the process, or wall time on a GPU.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grouped_questions import QUESTIONS, build_model
from rich.console import Console
from rich.table import Table
from turns import in_turns, options, ratio, spread

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.cost import request_cost
from mllm.loading import merge_llm_adapter
from mllm.settings import AdapterSettings

TARGETS = {
    "q, v": ["q_proj", "v_proj"],
    "all seven": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def run_of(generate: Callable[[], object]) -> Callable[[Any], object]:
    """A run that needs nothing prepared."""
    return lambda _: generate()


def compare(given: argparse.Namespace) -> Table:
    """Equality first, then times in turns."""
    device = torch.device(given.device)
    table = Table(title=f"LoRA of rank 16, prompt and {given.new_tokens} new tokens: seconds")
    for column in ("on", "beside", "merged", "ids", "times faster", "FLOPs", "largest difference of logits"):
        table.add_column(column, justify="right")
    for name, targets in TARGETS.items():
        adapter = AdapterSettings(rank=16, alpha=16, targets=targets)
        model, processor = build_model(device, getattr(torch, given.dtype), adapter=adapter)
        merged = copy.deepcopy(model)
        merge_llm_adapter(merged)
        inputs = {key: value.to(device) for key, value in processor(text=QUESTIONS[0]).items()}
        options = {"do_sample": False, "max_new_tokens": given.new_tokens, "min_new_tokens": given.new_tokens}
        models: dict[str, Any] = {"beside": model, "merged": merged}
        ids = [one.generate(**inputs, **options).tolist() for one in models.values()]
        with torch.no_grad():
            beside, own = (one(**inputs).logits for one in models.values())
        off = float((own - beside).abs().max() / beside.abs().max())
        if given.dtype == "float32" and (ids[0] != ids[1] or off > 1e-4):
            raise SystemExit(f"{name}: a merged adapter gives other ids, or logits that differ by {off:.1e}")
        runs = {way: run_of(partial(one.generate, **inputs, **options)) for way, one in models.items()}
        times = in_turns(runs, given.repeats, device)
        length = inputs["input_ids"].shape[1]
        costs = [
            request_cost(one.config, [], num_prompt_tokens=length, num_new_tokens=given.new_tokens).total
            for one in models.values()
        ]
        speed = ratio(times["beside"], times["merged"])
        table.add_row(name, *map(spread, times.values()), "equal", speed, f"{costs[0] / costs[1]:.2f}", f"{off:.1e}")
    return table


def main() -> None:
    given = options(__doc__, 9, new_tokens=24, with_device=True)
    Console(width=140).print(compare(given))


if __name__ == "__main__":
    main()
