"""Writes the model card of a run: its parts and their licences, budgets, training, results, and how to use it.

Knows the files of a run folder, and the card format of model hubs. Does not know models or networks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mllm.evaluation.run_report import Rows, read_results
from mllm.utils.markdown import markdown_table
from mllm.utils.run_paths import CONFIG, RUN_CONFIG

CARD = "README.md"
PLOT_IN_CARD = "results.png"
NOT_STATED = "not stated where it was loaded from"
HUB_TASKS = {"asr": "automatic-speech-recognition", "vqa": "visual-question-answering"}
"""What hubs call our tasks; the others go by their own names."""


@dataclass(frozen=True)
class PartFacts:
    """Says where a frozen part of a run comes from.

    Args:
        name: llm, image, audio, video or host.
        reference: a hub name, or the last part of the path of a folder.
        is_public: whether others can load it by its reference.
        licence: what the card beside its weights says.
    """

    name: str
    reference: str
    is_public: bool
    licence: str


def card_of(run: Path, *, repo: str | None = None, licence: str | None = None, is_export: bool = False) -> str:
    """Write the card of a run as text.

    Args:
        run: the run folder.
        repo: under which name it will be found, for the lines that load it.
        licence: of the result, such as apache-2.0; left open when None, since it depends on the parts'.
        is_export: the card is for an export of the run, which holds all of its parts.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run} holds no {CONFIG}; a card is written of a finished run")
    config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    settings = _settings(run)
    parts, results = parts_of(config), _without_folders(read_results(run))
    data = ModelCardData(
        license=licence,
        tags=["mllm", "elastic", *sorted(config.get("media") or {})],
        base_model=[part.reference for part in parts if part.is_public] or None,
        model_name=run.resolve().name,
        eval_results=_eval_results(results),
    )
    name = repo or run.resolve().name
    sections = [
        f"# {name.rpartition('/')[2]}",
        "One set of weights serves every token budget below; `mllm` says at inference what each medium may cost.",
        *_part_section(parts, is_export=is_export),
        *_budget_section(config),
        *_training_section(settings, config),
        *_result_section(run, results),
        *_use_section(name, parts, is_export=is_export),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def parts_of(config: Mapping[str, Any]) -> list[PartFacts]:
    """List the frozen parts that a run's config names."""
    parts = []
    for name, source in (config.get("sources") or {}).items():
        reference = str(source["reference"])
        folder = Path(source["folder"]) if source.get("folder") else Path(reference)
        is_folder = Path(reference).is_absolute() or (folder == Path(reference) and folder.is_dir())
        shown = Path(reference).name if is_folder else reference
        is_public = not is_folder and "/" in reference and not reference.startswith((".", "~"))
        parts.append(PartFacts(name, shown, is_public, licence_of(folder)))
    return parts


def licence_of(folder: Path) -> str:
    """Read the licence that the card beside a part's weights states."""
    if not (folder / CARD).is_file():
        return NOT_STATED
    try:
        stated = ModelCard.load(folder / CARD).data.to_dict().get("license")
    except (ValueError, yaml.YAMLError):  # a page that is no card
        return NOT_STATED
    return str(stated or NOT_STATED)


def plot_of(run: Path) -> Path | None:
    """Find the plot of a run's last evaluation."""
    plots = sorted(run.glob("evaluation*/**/pareto.png"), key=lambda path: path.stat().st_mtime)
    return plots[-1] if plots else None


def _settings(run: Path) -> Mapping[str, Any]:
    path = run / RUN_CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _part_section(parts: Sequence[PartFacts], *, is_export: bool) -> list[str]:
    if not parts:
        return []
    rows = [[part.name, part.reference, part.licence] for part in parts]
    held = (
        "are in this checkpoint" if is_export else "are loaded from where they were published; this folder adds to them"
    )
    return [
        "## Parts",
        f"These parts {held}. Their licences hold for what is made of them.",
        markdown_table(["part", "from", "licence"], rows),
    ]


def _budget_section(config: Mapping[str, Any]) -> list[str]:
    rows = []
    for medium, block in (config.get("media") or {}).items():
        compressor = block.get("compressor") or {}
        kind = compressor.get("kind") if isinstance(compressor, Mapping) else compressor
        budgets = ", ".join(f"`{medium}={budget}`" for budget in block.get("budgets") or [])
        rows.append([medium, str(kind or ""), budgets])
    if not rows:
        return []
    note = "Budgets between them work where the compressor can serve them, and were not trained."
    return ["## Trained budgets", markdown_table(["medium", "compressor", "budgets"], rows), note]


def _training_section(settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    adapter = config.get("adapter")
    trained = ", ".join(config.get("trained_parts") or [])
    lines = [f"- trained: {trained}"] if trained else []
    if adapter:
        shown = ", ".join(f"{key} {value}" for key, value in adapter.items() if value not in (None, [], ""))
        lines.append(f"- adapter: {shown}")
    if settings:
        data, train, sampler = (settings.get(block) or {} for block in ("data", "train", "sampler"))
        manifests = ", ".join(f"`{Path(path).name}`" for path in data.get("train") or [])
        length = f"{train['max_steps']} steps" if train.get("max_steps") else f"{train.get('epochs')} epochs"
        lines += [
            f"- data: {manifests}",
            f"- budgets of a step: {sampler.get('mode')}",
            f"- {length}, learning rate {train.get('learning_rate')}, seed {train.get('seed')}",
        ]
    return ["## Training", "\n".join(lines)] if lines else []


def _result_section(run: Path, results: Rows) -> list[str]:
    if not results:
        return []
    rows = [
        [str(row["set"]), _task(row), f"`{row['budget']}`", _shown(row.get("soft_tokens")), _value(row), _interval(row)]
        for row in results
    ]
    table = markdown_table(["set", "task", "budget", "soft tokens", "result, %", "95 % interval"], rows)
    plot = [f"![Results against soft tokens]({PLOT_IN_CARD})"] if plot_of(run) is not None else []
    return ["## Results", table, *plot]


def _use_section(name: str, parts: Sequence[PartFacts], *, is_export: bool) -> list[str]:
    missing = [part for part in parts if not part.is_public]
    lines = [f"```python\nimport mllm\n\nmodel, processor = mllm.load(FOLDER)  # a download of {name}\n```"]
    if missing and not is_export:
        named = " and ".join(f"`{part.name}` ({part.reference})" for part in missing)
        lines.append(
            f"{named} were loaded from folders; say where they are with `sources={{...}}`, or `--sources.NAME FOLDER` "
            "on the command line. Weights of another digest are refused."
        )
    return ["## Use", *lines]


def _eval_results(results: Rows) -> list[EvalResult] | None:
    found = [
        EvalResult(
            task_type=HUB_TASKS.get(row["task"], str(row["task"])),
            dataset_type=str(row["set"]),
            dataset_name=f"{row['set']}{_noise(row)} at {row['budget']}",
            metric_type=row["metric"],
            metric_value=round(100 * row["value"], 2),
        )
        for row in results
        if row.get("kind") is None and row.get("value") is not None
    ]
    return found or None


def _without_folders(results: Rows) -> Rows:
    """Cut sets that are called by their paths down to as many last parts as tell them apart."""
    names = {str(row["set"]) for row in results}

    def shown(name: str, depth: int) -> str:
        return "/".join(Path(name).parts[-depth:]) if Path(name).is_absolute() else name

    depth = 1
    while len({shown(name, depth) for name in names}) < len(names):
        depth += 1
    return [{**row, "set": shown(str(row["set"]), depth)} for row in results]


def _task(row: Mapping[str, Any]) -> str:
    kind = f" {row['kind']}" if row.get("kind") else ""
    return f"{row['task']}{kind}{_noise(row)}"


def _noise(row: Mapping[str, Any]) -> str:
    return "" if row.get("snr_db") is None else f" at {row['snr_db']:g} dB"


def _value(row: Mapping[str, Any]) -> str:
    return "" if row.get("value") is None else f"{row['metric']} {100 * row['value']:.1f}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ""
