"""Counts which experts of an adapter the tokens chose, writes the counts to the run folder, plots them as a heat map.

Knows counts by budget, layer, kind of token and expert. Does not know how experts are chosen.

`experts.jsonl` has one row per report, `{"step": ..., "counts": {"audio=/4": [...]}}`, the counts (L, K, N).
Shapes: B views, L layers, K kinds of tokens (`TOKEN_KINDS`), N routed experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mllm.adapters.adapter_inputs import TOKEN_KINDS
from mllm.utils.distributed import gather_json
from mllm.utils.files import append_text

COUNTS = "experts.jsonl"
PLOT = "experts.png"


class ExpertUsage:
    """Adds up counts since the last report; they stay on the device until they are reported."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], budgets: Tensor, usage: Tensor) -> None:
        """Add the counts of one training batch.

        Args:
            names: of the budgets of the batch.
            budgets: (B,) int64, which of them each view is at.
            usage: (L, B, K, N).
        """
        shape = (usage.shape[0], len(names), *usage.shape[2:])
        by_budget = torch.zeros(shape, dtype=torch.float64, device=usage.device)
        by_budget.index_add_(1, budgets.to(usage.device), usage.double())
        for number, name in enumerate(names):
            before = self.counts.get(name)
            self.counts[name] = by_budget[:, number] if before is None else before + by_budget[:, number]

    def report(self, accelerator: Accelerator, step: int, run: Path) -> None:
        """Write the counts of all processes and begin again; a collective."""
        total: dict[str, np.ndarray] = {}
        on_this_process = {name: counts.round().long().tolist() for name, counts in self.counts.items()}
        for of_process in gather_json(on_this_process):
            for name, counts in of_process.items():
                total[name] = total.get(name, 0) + np.array(counts)
        self.counts = {}
        if accelerator.is_main_process:
            row = {"step": step, "counts": {name: counts.tolist() for name, counts in sorted(total.items())}}
            append_text(run / COUNTS, json.dumps(row) + "\n")


def read_counts(path: Path) -> dict[str, np.ndarray]:
    """Read the counts (L, K, N) of a whole run by budget; a step that a resumed run repeated counts once."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    counts_by_step = {row["step"]: row["counts"] for row in rows}
    total: dict[str, np.ndarray] = {}
    for counts_by_budget in counts_by_step.values():
        for name, counts in counts_by_budget.items():
            total[name] = total.get(name, 0) + np.array(counts)
    return total


def plot_experts(counts: Mapping[str, np.ndarray], path: Path) -> None:
    """Plot a map of layers by experts for every kind of token and budget: fractions of the tokens, 1 / N is even."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in range(len(TOKEN_KINDS)) if any(of_budget[:, kind].any() for of_budget in counts.values())]
    figure = Figure(figsize=(2.6 * len(counts) + 1.5, 2.4 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    grid = figure.subplots(len(kinds), len(counts), squeeze=False)
    image: Any = None
    for kind, axes in zip(kinds, grid, strict=True):
        for (name, of_budget), axis in zip(sorted(counts.items()), axes, strict=True):
            fractions = of_budget[:, kind] / np.maximum(of_budget[:, kind].sum(axis=1, keepdims=True), 1)
            image = axis.imshow(fractions, vmin=0.0, vmax=1.0, aspect="auto")
            axis.set_title(f"{TOKEN_KINDS[kind]} at {name}", fontsize="small")
            axis.set_xlabel("expert", fontsize="small")
            axis.set_ylabel("layer", fontsize="small")
    figure.colorbar(image, ax=grid, label="fraction of the choices")
    figure.savefig(path, dpi=120)
