"""Runs lmms-eval's tasks at several budgets at once: the first evaluation answers at all of them, the others look up.

Knows lmms-eval's evaluator and what it returns. Does not know how a request is answered.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import handle_non_serializable

from mllm.lmms import MODEL_NAME
from mllm.lmms.model import ElasticChat

RESULTS, SAMPLES = "results.json", "samples.jsonl"


@dataclass(frozen=True)
class Evaluated:
    """The results of lmms-eval at one budget; `soft_tokens` are the mean of a request, by medium."""

    budget: str
    is_trained: bool
    soft_tokens: dict[str, float]
    results: dict[str, Any]

    def scores(self) -> Iterator[tuple[str, str, float]]:
        """Yields task, metric and value of every score that is a number."""
        for task, values in self.results["results"].items():
            for name, value in values.items():
                metric, _, filtered = name.partition(",")
                if isinstance(value, int | float) and filtered and "_stderr" not in metric:
                    yield task, metric if filtered == "none" else name, float(value)


def sweep(
    chat: ElasticChat, *, tasks: Sequence[str], include_path: str | None = None, **options: Any
) -> Iterator[Evaluated]:
    """Evaluates at each of the model's budgets.

    Args:
        chat: a model with its budgets.
        tasks: names of tasks, groups or tags; a `*` stands for anything.
        include_path: a folder with tasks beside those of lmms-eval.
        options: passed on to lmms-eval's `simple_evaluate`.

    Yields:
        One per budget; nothing on processes other than the first.

    Raises:
        ValueError: no such task, or a request that cannot be answered.
    """
    manager = TaskManager("WARNING", include_path=include_path, model_name=MODEL_NAME)
    names = manager.match_tasks(list(tasks))
    if missing := [task for task in tasks if task not in names and "*" not in task] or (not names and list(tasks)):
        raise ValueError(f"lmms-eval has no task {missing[0]!r}; `lmms-eval tasks list` names those it has")
    for number, budget in enumerate(chat.answers.budgets):
        chat.reported = number
        # `model_args` only label the results where the model is given as an object.
        results = simple_evaluate(
            model=chat, model_args=f"budget={budget}", tasks=names, task_manager=manager, **options
        )
        if results is not None:
            trained = chat.answers.processor.space.is_trained(budget)
            yield Evaluated(str(budget), trained, chat.soft_tokens(), results)


def write(evaluated: Sequence[Evaluated], folder: Path) -> None:
    """Writes the results of all budgets, and the answers to every question where they were kept."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for one in evaluated:
        for task, samples in (one.results.pop("samples", None) or {}).items():
            lines += [{"budget": one.budget, "task": task, **sample} for sample in samples]
    text = json.dumps([asdict(one) for one in evaluated], indent=1, default=handle_non_serializable)
    (folder / RESULTS).write_text(text + "\n")
    if lines:
        texts = [json.dumps(line, default=handle_non_serializable) for line in lines]
        (folder / SAMPLES).write_text("\n".join(texts) + "\n")


def table_rows(evaluated: Sequence[Evaluated]) -> list[list[str]]:
    """Makes a head and a row per score, one column per budget; the last row is what the budgets cost."""
    names = list(dict.fromkeys((task, metric) for one in evaluated for task, metric, _ in one.scores()))
    columns = [{(task, metric): value for task, metric, value in one.scores()} for one in evaluated]
    head = ["task", "metric", *(one.budget + ("" if one.is_trained else " (untrained)") for one in evaluated)]
    rows = [[*name, *(f"{column[name]:.4f}" if name in column else "" for column in columns)] for name in names]
    costs = [", ".join(f"{m} {n:g}" for m, n in one.soft_tokens.items()) or "none" for one in evaluated]
    return [head, *rows, ["soft tokens", "mean", *costs]]
