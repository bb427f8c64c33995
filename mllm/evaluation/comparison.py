"""Lays results of one model or of several side by side: read, checked to be of the same samples, written.

Knows result folders. Does not know models or how they answered.

    out/speech.md        the tables of `speech_table.py`
    out/speech.json      the same with everything the results hold
    out/speech.png       WER against soft tokens per second and against TFLOPs of the prompt
    out/benchmarks.md    the table of `vision_comparison.py`, with .json and .png likewise
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.config.evaluation import EVALUATION
from mllm.evaluation.answer_store import FINGERPRINT
from mllm.evaluation.plot import plot_pareto
from mllm.evaluation.report import RESULTS, cut_notes
from mllm.evaluation.speech_table import Block, Row, blocks_of, column_of, to_data, to_markdown
from mllm.evaluation.vision_comparison import VisionComparison, columns_by_task, vision_comparison
from mllm.utils.files import write_text_whole
from mllm.utils.run_paths import CHECKPOINT_NAME, CONFIG, PROCESSOR, results_folder

MARKDOWN, DATA, PLOT = "speech.md", "speech.json", "speech.png"
VISION_MARKDOWN, VISION_DATA, VISION_PLOT = "benchmarks.md", "benchmarks.json", "benchmarks.png"
AXES = {"tokens_per_second": "soft tokens per second", "published_tflops": "TFLOPs of the prompt (mean)"}
SAME = (
    *("num_beams", "length_penalty", "max_new_tokens", "dtype"),
    *("long_audio", "window_seconds", "overlap_seconds"),
)
"""Settings that should be the same for all models; a note says where they are not."""


@dataclass
class Comparison:
    """Rows of results by model, and how they came about.

    `differences` say which settings of the evaluations differ, which the table cannot show, and `cut` how many answers
    had not ended.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        """Lays the rows out.

        Raises:
            ValueError: see `blocks_of`.
        """
        return blocks_of(self.rows)

    @property
    def vision(self) -> VisionComparison | None:
        """Lays the vision results out, or returns None where there are none.

        Raises:
            ValueError: see `vision_comparison`.
        """
        return vision_comparison(self.rows)

    @property
    def notes(self) -> list[str]:
        """Returns what is said below the tables."""
        return [*self.differences, *self.cut]

    def write(self, folder: Path, *, with_plot: bool = True) -> None:
        """Writes `speech.md`, `speech.json` and `speech.png`, and `benchmarks` likewise, each where it has a table."""
        folder.mkdir(parents=True, exist_ok=True)
        notes = "".join(f"\n{note}\n" for note in self.notes)
        if blocks := self.blocks:
            write_text_whole(folder / MARKDOWN, to_markdown(blocks) + notes)
            self._write_data(folder / DATA, blocks=to_data(blocks))
            if with_plot:
                plot_pareto(self._plotted(), folder / PLOT, axes=AXES)
        if (vision := self.vision) is not None:
            write_text_whole(folder / VISION_MARKDOWN, vision.to_markdown() + notes)
            self._write_data(folder / VISION_DATA, models=vision.to_data())
            if with_plot:
                plot_pareto(vision.plotted, folder / VISION_PLOT)

    def _write_data(self, file: Path, **content: Any) -> None:
        content |= {"differences": self.differences, "cut": self.cut}
        write_text_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _plotted(self) -> list[Row]:
        names = len(self.rows) > 1
        return [
            {**row, "model": model if names else ""}
            for model, rows in self.rows.items()
            for row in rows
            if column_of(row) is not None
        ]


def compare(folders: Sequence[str]) -> Comparison:
    """Lays results of several models side by side.

    Args:
        folders: `DIR` or `NAME=DIR`: a folder of results, or a run or a checkpoint of one, of which the evaluation
            without a name is taken, or else the only one. Folders of one name make one line, as where a model was
            trained for each column.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: nothing to compare, a run with several evaluations, results on different samples, or two results
            for one cell.
    """
    if not folders:
        raise ValueError("folders is empty; name at least one folder of results")
    comparison, digests = Comparison(), {}
    used: dict[str, dict[str, set[str]]] = {key: {} for key in SAME}
    for folder in folders:
        name, path = _named(folder)
        content = json.loads((path / RESULTS).read_text(encoding="utf-8"))
        _check_samples(path, content["facts"], digests)
        comparison.rows.setdefault(name, []).extend(content["rows"])
        comparison.cut += cut_notes(content["rows"], content["facts"].get("max_new_tokens"), model=name)
        for key in SAME:
            if key in content["facts"]:
                used[key].setdefault(str(content["facts"][key]), set()).add(name)
    comparison.differences = [_difference(key, models) for key, models in used.items() if len(models) > 1]
    if not comparison.blocks and comparison.vision is None:
        tasks = ", ".join(columns_by_task())
        raise ValueError(f"the results hold nothing to compare: no asr, vsr or avsr at a rate, and none of {tasks}")
    return comparison


def comparison_of(rows: Sequence[Row], model: str, *, max_new_tokens: int | None = None) -> Comparison | None:
    """Makes the table of one model, or None where its results hold no speech."""
    speech = [row for row in rows if column_of(row) is not None]
    return Comparison({model: speech}, cut=cut_notes(speech, max_new_tokens)) if speech else None


def short_name(path: str | Path) -> str:
    """Names a model in a table: the last folder of its path that says something; a checkpoint with its run."""
    parts = [part for part in Path(path).parts if part not in (EVALUATION, "/", ".", "..")]
    if not parts:
        return str(path)
    checkpoint = parts[-1].removeprefix(f"{EVALUATION}-")
    return "/".join((*parts[-2:-1], checkpoint)) if CHECKPOINT_NAME.fullmatch(checkpoint) else parts[-1]


def _named(folder: str) -> tuple[str, Path]:
    name, equals, rest = folder.partition("=")
    path = Path(rest if equals else folder)
    inner = results_folder(path, EVALUATION)
    folders = [candidate for candidate in (path, inner) if (candidate / RESULTS).is_file()]
    folders = folders[:1] or sorted(file.parent for file in inner.glob(f"*/{RESULTS}"))
    if not folders:
        raise FileNotFoundError(f"{path} holds no {RESULTS}; evaluate the model first")
    if len(folders) > 1:
        raise ValueError(f"{path} holds several evaluations; name one of {', '.join(map(str, folders))}")
    return (name if equals else _name_of(path)), folders[0]


def _name_of(path: Path) -> str:
    """Names the model, and the evaluation as well where it is one of several of a model."""
    around, run = path.parent, path.parent.parent
    is_run = (run / CONFIG).is_file() or (run / PROCESSOR).is_file()
    if is_run and (around.name == EVALUATION or CHECKPOINT_NAME.fullmatch(around.name.removeprefix(f"{EVALUATION}-"))):
        return f"{short_name(around)}/{path.name}"
    return short_name(path)


def _check_samples(folder: Path, facts: Mapping[str, Any], digests: dict[str, tuple]) -> None:
    """Refuses results on different samples, whose numbers say nothing about each other."""
    mark = folder / FINGERPRINT
    manifests = json.loads(mark.read_text()).get("manifests", {}) if mark.is_file() else {}
    for name, digest in manifests.items():
        facts_of_set = (digest, facts.get("limit"))
        before, where = digests.setdefault(name, (facts_of_set, folder))
        if before != facts_of_set:
            difference = "limits" if before[0] == digest else "manifests"
            raise ValueError(
                f"{where} and {folder} have different {difference} behind the set {name!r}; evaluate them alike"
            )


def _difference(key: str, models: Mapping[str, set[str]]) -> str:
    words = (f"{value} for {', '.join(sorted(names))}" for value, names in models.items())
    return f"{key} is {'; '.join(words)}"
