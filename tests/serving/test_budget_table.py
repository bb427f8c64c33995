"""What a server tells of its budgets, measured or not."""

import tiny

from mllm.budget import Budget
from mllm.serving.budget_table import Measurement, budget_table
from mllm.serving.budgets import BudgetPolicy


def test_tokens_flops_and_cache_are_told_of_every_budget_and_times_of_those_that_are_measured() -> None:
    config = tiny.settings(("image",), image={"budgets": list(range(1, 13))})
    model, processor = tiny.model(config), tiny.processor(config)
    policy = BudgetPolicy(processor.space, Budget(), Budget())
    measured = budget_table(model, processor, policy, Measurement(new_tokens=2, repeats=1))
    untimed = budget_table(model, processor, policy, Measurement(new_tokens=2, repeats=0))
    assert [row["tokens"] for row in measured] == list(range(12, 0, -1))
    assert sum(row["milliseconds"] is not None for row in measured) == 8
    assert all(row["milliseconds"] is None for row in untimed)
    for key in ("budget", "tokens", "flops", "kv_bytes"):
        assert [row[key] for row in measured] == [row[key] for row in untimed]
    flops = [row["flops"] for row in measured]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == 12
