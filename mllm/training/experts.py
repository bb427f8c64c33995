"""Which experts of an adapter the tokens chose: counted in training, written to the run folder, drawn as a heat map.

Knows counts by budget, layer, kind of token and expert. Does not know how experts are chosen.

`experts.jsonl` has one row per report, `{"step": ..., "counts": {"audio=/4": [...]}}`, the counts (L, K, N).
Shapes: B passes, L layers, K kinds of tokens (`TOKEN_KINDS`), N routed experts.
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
from mllm.training.logs import gather_json

COUNTS = "experts.jsonl"
PLOT = "experts.png"


class ExpertUsage:
    """Counts since the last report; they stay on the device until they are asked for."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], budgets: Tensor, usage: Tensor) -> None:
        """Add the counts of one pass.

        Args:
            names: of the budgets of the pass.
            budgets: (B,) int64, which of them each row was run at.
            usage: (L, B, K, N).
        """
        shape = (usage.shape[0], len(names), *usage.shape[2:])
        by_budget = torch.zeros(shape, dtype=torch.float64, device=usage.device)
        by_budget.index_add_(1, budgets.to(usage.device), usage.double())
        for place, name in enumerate(names):
            before = self.counts.get(name)
            self.counts[name] = by_budget[:, place] if before is None else before + by_budget[:, place]

    def report(self, accelerator: Accelerator, step: int, run: Path) -> None:
        """Write the counts of all processes and begin again; a collective."""
        total: dict[str, np.ndarray] = {}
        for part in gather_json(accelerator, {name: own.round().long().tolist() for name, own in self.counts.items()}):
            for name, counts in part.items():
                total[name] = total.get(name, 0) + np.array(counts)
        self.counts = {}
        if accelerator.is_main_process:
            row = {"step": step, "counts": {name: own.tolist() for name, own in sorted(total.items())}}
            with (run / COUNTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_counts(path: Path) -> dict[str, np.ndarray]:
    """The counts (L, K, N) of a whole run by budget; a step that a resumed run repeated counts once."""
    rows = {own["step"]: own["counts"] for own in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    total: dict[str, np.ndarray] = {}
    for counts in rows.values():
        for name, own in counts.items():
            total[name] = total.get(name, 0) + np.array(own)
    return total


def draw_experts(counts: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw one map of layers by experts for every kind of token and budget: the share of the tokens, 1 / N is even."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [place for place in range(len(TOKEN_KINDS)) if any(own[:, place].any() for own in counts.values())]
    figure = Figure(figsize=(2.6 * len(counts) + 1.5, 2.4 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    grid = figure.subplots(len(kinds), len(counts), squeeze=False)
    image: Any = None
    for kind, axes in zip(kinds, grid, strict=True):
        for (name, own), axis in zip(sorted(counts.items()), axes, strict=True):
            shares = own[:, kind] / np.maximum(own[:, kind].sum(axis=1, keepdims=True), 1)
            image = axis.imshow(shares, vmin=0.0, vmax=1.0, aspect="auto")
            axis.set_title(f"{TOKEN_KINDS[kind]} at {name}", fontsize="small")
            axis.set_xlabel("expert", fontsize="small")
            axis.set_ylabel("layer", fontsize="small")
    figure.colorbar(image, ax=grid, label="share of the choices")
    figure.savefig(path, dpi=120)
