"""What choosing the budget per question could give at best: the smallest budget at which each is answered right.

Knows lines of answers and benchmarks. Does not know how they came about.

An upper bound: it knows the answers, and of several attempts at a choice one is right by luck. Questions that no budget
answers right are billed twice: at the largest budget, which an honest search for more tokens ends at, and at the
smallest, as the paper of Matryoshka Multimodal Models does (1 token there).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.evaluation.answer_store import Line
from mllm.evaluation.benchmark_table import Column
from mllm.evaluation.scorers.registry import BENCHMARKS, worths_of_units


@dataclass(frozen=True)
class Oracle:
    """Of one set of one benchmark.

    values: as the benchmark's columns print them, when each question is answered at its budget.
    smallest: how many questions need which budget, cheapest first. num_all_wrong: how many none answers right.
    tokens, tokens_all_wrong_smallest: mean soft tokens per question where those are billed at the largest and at the
    smallest budget.
    """

    set_name: str
    task: str
    num_questions: int
    num_all_wrong: int
    smallest: dict[str, int]
    values: dict[str, float | None]
    tokens: float
    tokens_all_wrong_smallest: float


def oracles_of(lines: Sequence[Line], columns: Sequence[Column]) -> list[Oracle]:
    """The oracle of each benchmark that was answered at two budgets or more and whose answers are known."""
    sets: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["task"] in BENCHMARKS and line["references"]:
            sets.setdefault((line["set"], line["task"]), []).append(line)
    found = []
    for (set_name, task), own in sets.items():
        mine = [column for column in columns if (column.set_name, column.task) == (set_name, task)]
        if (oracle := _oracle(set_name, task, own, mine)) is not None:
            found.append(oracle)
    return found


def _oracle(set_name: str, task: str, lines: Sequence[Line], columns: Sequence[Column]) -> Oracle | None:
    benchmark = BENCHMARKS[task]
    by_budget = _by_budget(lines)
    if len(by_budget) < 2:
        return None
    worths = {budget: worths_of_units(benchmark, own) for budget, own in by_budget.items()}
    tokens = {budget: _tokens_of_units(task, own) for budget, own in by_budget.items()}
    cheapest, dearest = next(iter(by_budget)), list(by_budget)[-1]
    chosen = {unit: _smallest_best(worths, unit) for unit in worths[cheapest]}
    all_wrong = [unit for unit, budget in chosen.items() if budget is None]

    def mean_tokens(of_all_wrong: str) -> float:
        return sum(tokens[budget or of_all_wrong][unit] for unit, budget in chosen.items()) / len(chosen)

    picked = [
        line for budget, own in by_budget.items() for line in own if (chosen[benchmark.unit(line)] or dearest) == budget
    ]
    total = benchmark.score(_in_order_of(by_budget[cheapest], picked))
    numbers = {"value": total.value, **total.details}
    return Oracle(
        set_name,
        task,
        len(chosen),
        len(all_wrong),
        {budget: sum(one == budget for one in chosen.values()) for budget in by_budget},
        {column.title: column.value(numbers) for column in columns},
        mean_tokens(dearest),
        mean_tokens(cheapest),
    )


def _by_budget(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines by budget, cheapest first; one at which nothing could be answered has no cost and is left out."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["budget"], []).append(line)
    means = {budget: _mean_tokens(own) for budget, own in found.items()}
    known = [budget for budget in found if means[budget] is not None]
    return {budget: found[budget] for budget in sorted(known, key=lambda budget: means[budget] or 0.0)}


def _mean_tokens(lines: Sequence[Line]) -> float | None:
    spent = [sum(line["tokens"].values()) for line in lines if "error" not in line]
    return sum(spent) / len(spent) if spent else None


def _tokens_of_units(task: str, lines: Sequence[Line]) -> dict[str, float]:
    """Mean soft tokens per attempt at each question; what failed is billed as the others are on average."""
    usual = _mean_tokens(lines) or 0.0
    spent: dict[str, list[float]] = {}
    for line in lines:
        own = usual if "error" in line else sum(line["tokens"].values())
        spent.setdefault(BENCHMARKS[task].unit(line), []).append(own)
    return {unit: sum(own) / len(own) for unit, own in spent.items()}


def _smallest_best(worths: Mapping[str, Mapping[str, float]], unit: str) -> str | None:
    """The cheapest budget with the best that any reaches, which is what "right" means for graded answers."""
    best = max(own[unit] for own in worths.values())
    return next((budget for budget, own in worths.items() if own[unit] == best), None) if best > 0 else None


def _in_order_of(lines: Sequence[Line], picked: Sequence[Line]) -> list[Line]:
    by_id = {line["id"]: line for line in picked}
    return [by_id[line["id"]] for line in lines]


def to_data(oracle: Oracle) -> dict[str, Any]:
    """For programs."""
    return {
        "set": oracle.set_name,
        "task": oracle.task,
        "num_questions": oracle.num_questions,
        "num_all_wrong": oracle.num_all_wrong,
        "smallest_right_budget": oracle.smallest,
        "values": oracle.values,
        "soft_tokens": oracle.tokens,
        "soft_tokens_all_wrong_smallest": oracle.tokens_all_wrong_smallest,
    }
