"""Tells whether answers that are kept are still those that would be given: everything an answer depends on, in brief.

Everything counts unless it stands in one of the lists here, which say why it does not: each file of the model's folder,
each key of the config, each sample. So a key that is added counts until somebody has thought about it (a test asks them
to).
Media files are not among it: each answer holds a stamp of those it is about (`media_stamps`), so that where one of them
changes the others are kept.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mllm.checkpoints.load import TRAINABLES
from mllm.config.evaluation import EvaluationConfig
from mllm.data.manifest import Sample
from mllm.utils.files import digest_of_file
from mllm.utils.run_paths import CONFIG, PROCESSOR, run_of

BY_CONTENT = ("model", "checkpoint", "sources", "manifest", "noise", "seed")
"""Settings that name something whose content counts in their place; the seed is that of the noise."""
NEVER_IN_ANSWERS = {
    "budgets": "every answer is kept with its budget",
    "snr_db": "every answer is kept with its ratio",
    "limit": "says how many samples are asked, not what",
    "allow_untrained": "says which budgets are refused; an answer says itself whether its budget was trained",
    "allow_training_noise": "says whether the noise is refused",
    "name": "says where answers are kept",
    "out": "says where answers are kept",
    "vqav2_questions": "is of what is handed in",
    "batch_size": "says how many are answered together; each as it would be alone, but for rounding",
    "max_rows": "says how many are answered together; each as it would be alone, but for rounding",
    "use_cpu": "says where the same sums are done",
}
"""Settings that no answer depends on, and why."""
UNREAD_SUFFIXES = (".csv", ".jsonl", ".lock", ".log", ".md", ".png", ".yaml")
UNREAD_FILES = (
    "bench.json",
    "demo.json",
    "manifest.json",
    "optimizer.safetensors",
    "trainer_state.json",
    "training.json",
)
"""Files beside a model that are not read to answer: of its training, of demos, of measurements."""


def fingerprint_of(settings: EvaluationConfig, sets: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Gathers what the answers depend on, as plain values.

    Args:
        sets: all samples of each manifest by its short name, whatever `settings.limit` is.

    Raises:
        OSError: a file that cannot be read.
    """
    others = {field.name for field in fields(settings)} - {*BY_CONTENT, *NEVER_IN_ANSWERS}
    noise = None if settings.noise is None else {"file": digest_of_file(settings.noise), "seed": settings.seed}
    paths = dict(zip(settings.set_names, settings.manifest, strict=True))
    return {
        "model": {file.name: digest_of_file(file) for file in files_of_model(settings.model_folder)},
        "sources": _undigested_parts(settings),
        "manifests": {name: _digest_of_set(settings, paths[name], samples) for name, samples in sets.items()},
        "noise": noise,
        **{key: value for key, value in asdict(settings).items() if key in others},
    }


def files_of_model(folder: Path) -> list[Path]:
    """Lists the files of a run, a checkpoint or an exported model that loading it may read, by name.

    Frozen parts in other folders are named in config.json with their digests, which loading compares.
    """
    files = _read_in(folder)
    run = run_of(folder)
    if run != folder and not (folder / PROCESSOR).is_file():
        # A checkpoint is used with the processor of its run, whose finished model is another one.
        checkpoint_names = {CONFIG, TRAINABLES, *(file.name for file in files)}
        files += [file for file in _read_in(run) if file.name not in checkpoint_names]
    return sorted(files, key=lambda file: file.name)


def _read_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.suffix not in UNREAD_SUFFIXES and file.name not in UNREAD_FILES]


def _undigested_parts(settings: EvaluationConfig) -> dict[str, str]:
    """Lists where parts come from whose weights loading cannot compare, since no digest of them was noted."""
    noted = json.loads((settings.model_folder / CONFIG).read_text(encoding="utf-8")).get("sources") or {}
    return {part: source for part, source in settings.sources.items() if not noted.get(part, {}).get("sha256")}


def _digest_of_set(settings: EvaluationConfig, path: str, samples: Sequence[Sample]) -> str:
    """Digests the file, if it is a manifest; else what was read, as texts and answers may stand in other files."""
    if settings.reader.format == "manifest":
        return digest_of_file(path)
    contents = [(sample.id, sample.task, sample.kind, sample.messages, sample.meta) for sample in samples]
    return hashlib.sha256(repr(contents).encode()).hexdigest()
