"""Measures what autograd keeps for the backward pass at all scales: the released M3 loop, one packed pass, little
memory.

    python benchmarks/activation_memory.py [--threads 1]

Steps and model are those of `pooled_step.py`, with the layers of the LLM kept or computed again in the backward pass
(as the released scripts train, scripts/v1_5/finetune.sh), and with two vocabularies: one at which the head is 21 % of
the LLM's FLOPs, and LLaVA's 32000. Counted is the largest sum, at one time, of the storages that hold what is saved for
a backward pass, each once, those of weights left out; what a layer holds while it is computed again is not in it. The
figures are the same on every machine. The goals are for the first vocabulary. There is no prediction: FLOPs say nothing
about memory.
"""

from functools import partial

from outcomes import Outcome, append, goal_text
from pooled_step import BUDGETS, example, m3_step
from rich.console import Console
from rich.table import Table
from side_by_side import (
    HEAD_FRACTION_VOCABULARY,
    check_equal,
    low_memory_step,
    packed_step,
    saved_megabytes,
)
from turns import options

GOALS = {"packed": 2.0, "memory low": 3.0}


def main() -> None:
    """Check, count and print."""
    arguments = options(__doc__, None)
    outcomes = []
    table = Table(title="saved for the backward pass, losses and gradients equal to 1e-5", title_justify="left")
    for name in ("vocabulary", "layers", "step", "MB", "less", "goal"):
        table.add_column(name, justify="left" if name in ("layers", "step") else "right")
    for vocabulary in (HEAD_FRACTION_VOCABULARY, 32_000):
        model, processor, batch = example(vocab_size=vocabulary)
        runs = {
            "M3 loop": partial(m3_step, model, processor, batch),
            "packed": partial(packed_step, model, processor, batch, BUDGETS),
            "memory low": partial(low_memory_step, model, processor, batch, BUDGETS),
        }
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        for layers in ("kept", "computed again"):
            if layers == "computed again":
                model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            worst = check_equal(model, runs)
            saved = {name: saved_megabytes(run, weights) for name, run in runs.items()}
            for name, megabytes in saved.items():
                less, goal = saved["M3 loop"] / megabytes, GOALS.get(name)
                table.add_row(str(vocabulary), layers, name, f"{megabytes:.1f}", f"{less:.2f}x", goal_text(goal))
                if goal is not None and vocabulary == HEAD_FRACTION_VOCABULARY:
                    what = f"saved for the backward pass, {name}, layers {layers}"
                    check = f"losses equal, gradients within {worst:.0e}"
                    outcomes.append(Outcome(what, "loop of M3", less, check, goal=goal))
    Console(width=120).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
