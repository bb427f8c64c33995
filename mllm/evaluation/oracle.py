"""Computes what choosing the budget per question could give at best: the smallest that answers each question right.

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
from mllm.evaluation.scorers.registry import BENCHMARKS, scores_of_questions


@dataclass(frozen=True)
class Oracle:
    """The oracle of one set of one benchmark.

    Args:
        num_all_wrong: questions that no budget answers right.
        smallest: how many questions need which budget, cheapest first.
        values: as the benchmark's columns print them, when each question is answered at its budget.
        tokens: mean soft tokens per question, where those that are all wrong are billed at the largest budget.
        tokens_all_wrong_smallest: the same where they are billed at the smallest.
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
    """Computes the oracle of each benchmark answered at two budgets or more whose answers are known."""
    sets: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["task"] in BENCHMARKS and line["references"]:
            sets.setdefault((line["set"], line["task"]), []).append(line)
    oracles = []
    for (set_name, task), set_lines in sets.items():
        set_columns = [column for column in columns if (column.set_name, column.task) == (set_name, task)]
        if (oracle := _oracle(set_name, task, set_lines, set_columns)) is not None:
            oracles.append(oracle)
    return oracles


def _oracle(set_name: str, task: str, lines: Sequence[Line], columns: Sequence[Column]) -> Oracle | None:
    benchmark = BENCHMARKS[task]
    by_budget = _by_budget(lines)
    if len(by_budget) < 2:
        return None
    scores = {budget: scores_of_questions(benchmark, budget_lines) for budget, budget_lines in by_budget.items()}
    tokens = {budget: _tokens_of_questions(task, budget_lines) for budget, budget_lines in by_budget.items()}
    cheapest, dearest = next(iter(by_budget)), list(by_budget)[-1]
    chosen = {question: _smallest_best(scores, question) for question in scores[cheapest]}
    all_wrong = [question for question, budget in chosen.items() if budget is None]

    def mean_tokens(budget_of_all_wrong: str) -> float:
        return sum(tokens[budget or budget_of_all_wrong][question] for question, budget in chosen.items()) / len(chosen)

    picked = [
        line
        for budget, budget_lines in by_budget.items()
        for line in budget_lines
        if (chosen[benchmark.question(line)] or dearest) == budget
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
    """Groups lines by budget, cheapest first; one at which nothing could be answered has no cost and is left out."""
    lines_of_budget: dict[str, list[Line]] = {}
    for line in lines:
        lines_of_budget.setdefault(line["budget"], []).append(line)
    means = {budget: _mean_tokens(budget_lines) for budget, budget_lines in lines_of_budget.items()}
    known = [budget for budget in lines_of_budget if means[budget] is not None]
    return {budget: lines_of_budget[budget] for budget in sorted(known, key=lambda budget: means[budget] or 0.0)}


def _mean_tokens(lines: Sequence[Line]) -> float | None:
    spent = [sum(line["tokens"].values()) for line in lines if "error" not in line]
    return sum(spent) / len(spent) if spent else None


def _tokens_of_questions(task: str, lines: Sequence[Line]) -> dict[str, float]:
    """Computes mean soft tokens per attempt at each question; failures are billed as the others are on average."""
    usual = _mean_tokens(lines) or 0.0
    spent: dict[str, list[float]] = {}
    for line in lines:
        tokens = usual if "error" in line else sum(line["tokens"].values())
        spent.setdefault(BENCHMARKS[task].question(line), []).append(tokens)
    return {question: sum(tokens) / len(tokens) for question, tokens in spent.items()}


def _smallest_best(scores: Mapping[str, Mapping[str, float]], question: str) -> str | None:
    """Finds the cheapest budget with the best score of any, which is what "right" means for graded answers."""
    best = max(of_questions[question] for of_questions in scores.values())
    reaching = (budget for budget, of_questions in scores.items() if of_questions[question] == best)
    return next(reaching) if best > 0 else None


def _in_order_of(lines: Sequence[Line], picked: Sequence[Line]) -> list[Line]:
    by_id = {line["id"]: line for line in picked}
    return [by_id[line["id"]] for line in lines]


def to_data(oracle: Oracle) -> dict[str, Any]:
    """Returns an oracle for programs."""
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
