"""Computes what a request takes at a budget in FLOPs, bytes of cache and milliseconds, for caps such as `flops<=2e12`.

Knows the FLOP model and a table of `mllm bench`. Does not know which budget is chosen by them.

Only what is known before an answer is counted: encoders, compressors and the pass over the prompt. How long an answer
becomes nobody knows. Milliseconds are those of the requests that were measured, whatever the length of this one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm.budget import Budget, TokenCount
from mllm.evaluation.bench import RESULTS as BENCH
from mllm.evaluation.flops import cost_problem, row_cost
from mllm.processing.batch import EncodedSample, num_prompt_tokens
from mllm.processing.processor import ElasticProcessor


@dataclass(frozen=True)
class ModelCosts:
    """Computes what requests to one model take.

    Args:
        model: an `ElasticForConditionalGeneration`.
        processor: the one that belongs to it.
        folder: may hold the `bench.json` of `mllm bench --out`, which milliseconds come from.
    """

    model: Any = field(repr=False)
    processor: ElasticProcessor = field(repr=False)
    folder: Path | None = None

    def __call__(self, row: EncodedSample, budget: Budget, counts: Sequence[TokenCount]) -> "Costs":
        """Return the costs of one row at a budget, by unit; each is computed when it is looked up.

        Raises:
            ValueError: on looking up: a model without a formula, or a budget that was not measured.
        """
        return Costs(self, row, budget, counts)

    def milliseconds_of(self, budgets: Sequence[Budget]) -> list[float] | None:
        """Return the measured milliseconds of several budgets; None unless all were measured."""
        if self.folder is None or not (self.folder / BENCH).is_file():
            return None
        known = self.milliseconds
        texts = [str(budget) for budget in budgets]
        return [known[text] for text in texts] if set(texts) <= known.keys() else None

    @cached_property
    def milliseconds(self) -> Mapping[str, float]:
        """The median milliseconds of each measured budget before its first new token.

        Raises:
            ValueError: nothing was measured.
        """
        path = None if self.folder is None else self.folder / BENCH
        if path is None or not path.is_file():
            raise ValueError(f"ms needs a measured {path or BENCH}: mllm bench --model RUN --out RUN")
        rows = json.loads(path.read_text(encoding="utf-8"))["budgets"]
        return {row["budget"]: row["encoder_ms"]["median"] + row["prefill_ms"]["median"] for row in rows}


@dataclass(frozen=True)
class Costs(Mapping[str, float]):
    """Looks up what one request takes at one budget, by unit."""

    of_model: ModelCosts
    row: EncodedSample
    budget: Budget
    counts: Sequence[TokenCount]

    def __getitem__(self, unit: str) -> float:
        if unit == "ms":
            known = self.of_model.milliseconds
            if str(self.budget) not in known:
                raise ValueError(f"{self.budget} was not measured; {BENCH} holds {'; '.join(known)}")
            return known[str(self.budget)]
        model, processor = self.of_model.model, self.of_model.processor
        if (problem := cost_problem(model.config)) is not None:
            raise ValueError(f"{unit} is not known of this model: {problem}")
        crop = getattr(processor.transforms.get("video"), "crop_size", 0)
        cost = row_cost(
            model,
            self.row,
            self.counts,
            frame_pixels=[(crop, crop)] * len(self.row.spans),
            num_prompt_tokens=num_prompt_tokens(self.row, self.counts),
            num_new_tokens=1,  # the pass over the prompt gives the first; what follows is not known beforehand
        )
        assert cost is not None
        return float(cost.total if unit == "flops" else cost.kv_bytes)

    def __iter__(self):
        return iter(("flops", "kv_bytes", "ms"))

    def __len__(self) -> int:
        return 3
