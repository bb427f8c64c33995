"""Makes results: rows of numbers from lines of answers, and their forms for eyes, programs and spreadsheets.

Knows lines and scores. Does not know models or plots.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mllm.evaluation.answer_store import Line
from mllm.evaluation.scoring import scorer_of
from mllm.utils.files import write_text_whole

RESULTS = "results.json"
CSV = "results.csv"
_GROUP = ("set", "task", "kind", "snr_db", "budget")
_MEANS = ("prompt_tokens", "new_tokens")
_TFLOPS = {"published_tflops": "published", "attention_tflops": "attention"}
"""Of the prompt: what speech papers print, twice the parameters per token, and the attention that leaves out."""


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    `rows` hold one metric each: what it is of (`set`, `task`, `kind` or None for all kinds, `snr_db`,
    `budget`), `metric`, `value`, `low`, `high` (95 % bootstrap), and means per sample: `soft_tokens`, `gflops`, ...
    `failures` name every sample that could not be answered, by budget. `facts` say what was evaluated and how.
    """

    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    routing: Mapping[str, str] = field(default_factory=dict)
    """By media that were answered at `auto`, the table that sets them beside fixed budgets, or what it needs."""

    def write(self, folder: Path) -> None:
        """Writes `results.json` and `results.csv`, each whole or not at all."""
        content = {"facts": dict(self.facts), "rows": self.rows, "failures": self.failures}
        write_text_whole(folder / RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text_whole(folder / CSV, text.getvalue())


def summarise(lines: Sequence[Line], *, seed: int, facts: Mapping[str, Any] | None = None) -> Results:
    """Scores lines by set, task, kind, noise and budget, and over all kinds where a task allows it.

    Args:
        lines: answers and failures.
        seed: random seed of the bootstrap intervals.
    """
    rows = []
    for group in _groups(lines):
        answered = [line for line in group.lines if "error" not in line]
        scorer = scorer_of(group.names["task"])
        score = scorer.score(group.lines if scorer.counts_failures else answered, seed)
        rows.append(
            {
                **group.names,
                "is_trained": all(line["is_trained"] for line in answered),
                "num_samples": len(answered),
                "num_failed": len(group.lines) - len(answered),
                "num_cut": sum(line.get("is_cut", False) for line in answered),
                "metric": score.metric,
                "value": score.value,
                "low": score.low,
                "high": score.high,
                **score.details,
                **_means(answered),
            }
        )
    failures = [
        {key: line[key] for key in ("set", "id", "snr_db", "budget", "error")} for line in lines if "error" in line
    ]
    return Results(rows, failures, facts or {})


@dataclass
class _Group:
    names: dict[str, Any]
    lines: list[Line]


def _groups(lines: Sequence[Line]) -> list[_Group]:
    """Groups lines by what a row is of, tasks and kinds in their order of appearance, dearest budgets first."""
    groups: dict[tuple, _Group] = {}
    kinds = {(line["set"], line["task"]): set() for line in lines}
    for line in lines:
        kinds[line["set"], line["task"]].add(line["kind"])
    for line in lines:
        several = len(kinds[line["set"], line["task"]]) > 1
        versions = [line["kind"]]
        if several and scorer_of(line["task"]).has_overall and line["kind"] is not None:
            versions.insert(0, None)
        for kind in versions:
            names = {**{key: line[key] for key in _GROUP}, "kind": kind}
            groups.setdefault(tuple(names.values()), _Group(names, [])).lines.append(line)
    rank: dict[tuple, int] = {}
    for key in groups:
        rank.setdefault(key[:-1], len(rank))

    def order(group: _Group) -> tuple:
        spent = [sum(line["tokens"].values()) for line in group.lines if "error" not in line]
        key = tuple(group.names.values())
        return rank[key[:-1]], -sum(spent) / max(len(spent), 1)

    return sorted(groups.values(), key=order)


def _means(lines: Sequence[Line]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float | None:
        return round(sum(values) / len(values), 3) if values else None

    media = dict.fromkeys(medium for line in lines for medium in line["tokens"])
    costs = [line["cost"] for line in lines if line["cost"] is not None]
    return {
        "soft_tokens": mean([sum(line["tokens"].values()) for line in lines]),
        **{f"{medium}_tokens": mean([line["tokens"].get(medium, 0) for line in lines]) for medium in media},
        **{key: mean([line[key] for line in lines]) for key in _MEANS},
        "tokens_per_second": _tokens_per_second(lines),
        "gflops": mean([cost["total"] / 1e9 for cost in costs]),
        "encoder_gflops": mean([cost["encoder"] / 1e9 for cost in costs]),
        "llm_gflops": mean([(cost["prefill"] + cost["decode"]) / 1e9 for cost in costs]),
        "kv_megabytes": mean([cost["kv_bytes"] / 1e6 for cost in costs]),
        **{key: _mean_tflops([cost[part] for cost in costs]) for key, part in _TFLOPS.items()},
    }


def _mean_tflops(flops: Sequence[int]) -> float | None:
    """Rounds the mean to six significant digits: toy models count in millionths."""
    return float(f"{sum(flops) / len(flops) / 1e12:.6g}") if flops else None


def _tokens_per_second(lines: Sequence[Line]) -> float | None:
    """Divides the soft tokens of audio and video by the seconds they last; None where there are none."""
    timed = [line for line in lines if line["seconds"]]
    seconds = sum(line["seconds"] for line in timed)
    return round(sum(sum(line["tokens"].values()) for line in timed) / seconds, 2) if seconds else None


def table(results: Results) -> Table:
    """Shows the rows in a terminal; rates and accuracies in percent."""
    shown = Table(title=f"{results.facts.get('model', 'results')}", title_justify="left", pad_edge=False)
    with_set = len({row["set"] for row in results.rows}) > 1
    with_noise = any(row["snr_db"] is not None for row in results.rows)
    columns = ["set"] * with_set + ["task", "kind"] + ["SNR dB"] * with_noise + ["budget"]
    for name in columns:
        shown.add_column(name)
    for name in ("samples", "metric", "value %", "95 % interval", "CER %", "S/D/I", "tokens", "GFLOP"):
        shown.add_column(name, justify="left" if name == "metric" else "right")
    before = None
    for row in results.rows:
        group = tuple(row[key] for key in _GROUP[:-1])
        if before not in (None, group):
            shown.add_section()
        before = group
        names = [row["set"]] * with_set + [row["task"], row["kind"] or "all"]
        names += ["clean" if row["snr_db"] is None else f"{row['snr_db']:g}"] * with_noise
        shown.add_row(*names, _budget_words(row), *_numbers(row))
    return shown


def cut_notes(rows: Sequence[Mapping[str, Any]], max_new_tokens: int | None, *, model: str = "") -> list[str]:
    """Says how many answers had not ended at `max_new_tokens`; a line per set, task and noise that has any.

    Args:
        rows: rows of results; those of kinds are left out where there is one over all kinds.
        model: named where the lines stand beside those of others.
    """
    groups: dict[tuple, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        of_budgets = groups.setdefault(tuple(row[key] for key in ("set", "task", "snr_db")), {})
        of_budgets.setdefault(row["budget"], []).append(row)
    notes = []
    for (set_name, task, snr_db), budgets in groups.items():
        cut = {budget: _num_cut(of_budgets) for budget, of_budgets in budgets.items()}
        if num_cut := sum(cut.values()):
            noise = "" if snr_db is None else f" at {snr_db:g} dB"
            counts = ", ".join(f"{count} at {budget or 'max'}" for budget, count in cut.items() if count)
            limit = "" if max_new_tokens is None else f" {max_new_tokens}"
            whose = f" of {model}" if model else ""
            notes.append(
                f"{num_cut} answers{whose} to {set_name} ({task}){noise} were cut at max_new_tokens{limit}: {counts}"
            )
    return notes


def _num_cut(rows: Sequence[Mapping[str, Any]]) -> int:
    overall = [row for row in rows if row["kind"] is None]
    return sum(row.get("num_cut", 0) for row in overall or rows)


def _budget_words(row: Mapping[str, Any]) -> str:
    return (row["budget"] or "max") + ("" if row["is_trained"] else " (not trained)")


def _numbers(row: Mapping[str, Any]) -> list[str]:
    failed = f" ({row['num_failed']} failed)" if row["num_failed"] else ""
    edits = "/".join(str(row[key]) for key in ("substitutions", "deletions", "insertions")) if "cer" in row else ""
    interval = "" if row["low"] is None else f"{100 * row['low']:.1f} - {100 * row['high']:.1f}"
    return [
        f"{row['num_samples']}{failed}",
        row["metric"],
        _percent(row["value"]),
        interval,
        _percent(row["cer"]) if "cer" in row else "",
        edits,
        "" if row["soft_tokens"] is None else f"{row['soft_tokens']:.1f}",
        "" if row["gflops"] is None else f"{row['gflops']:.3g}",
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
