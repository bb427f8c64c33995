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
from typing import Any

from mllm.checkpoints.model_files import fingerprint_of_model
from mllm.config.evaluation import EvaluationConfig
from mllm.data.manifest import Sample
from mllm.evaluation.bench import RESULTS as BENCH
from mllm.router.router import FILE as ROUTER
from mllm.router.router import WEIGHTS as ROUTER_WEIGHTS
from mllm.utils.files import digest_of_file
from mllm.utils.run_paths import CONFIG

BY_CONTENT = ("model", "checkpoint", "sources", "manifest", "noise", "seed")
"""Settings that name something whose content counts in their place; the seed is that of the noise."""
NEVER_IN_ANSWERS = {
    "budgets": "every answer is kept with its budget",
    "snr_db": "every answer is kept with its ratio",
    "limit": "says how many samples are asked, not what",
    "allow_untrained": "says which budgets are refused; an answer says itself whether its budget was trained",
    "allow_training_noise": "says whether the noise is refused",
    "untrained_padding": "says whether audio_padding is refused",
    "name": "says where answers are kept",
    "out": "says where answers are kept",
    "vqav2_questions": "is of what is handed in",
    "batch_size": "says how many are answered together; each as it would be alone, but for rounding",
    "max_rows": "says how many are answered together; each as it would be alone, but for rounding",
    "use_cpu": "says where the same sums are done",
    "verify": "says whether the files are compared with what was written, not what they hold",
}
"""Settings that no answer depends on, and why."""


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
        "model": fingerprint_of_model(settings.model_folder),
        "sources": _undigested_parts(settings),
        "manifests": {name: _digest_of_set(settings, paths[name], samples) for name, samples in sets.items()},
        "noise": noise,
        **_choosing_files(settings),
        **{key: value for key, value in asdict(settings).items() if key in others},
    }


def _choosing_files(settings: EvaluationConfig) -> dict[str, str]:
    """Digest the files that open budgets are resolved by, where there are such budgets."""
    budgets, folder = settings.parsed_budgets, settings.model_folder
    names = [ROUTER, ROUTER_WEIGHTS] if any(budget.auto is not None for budget in budgets) else []
    if any(limit.unit == "ms" for budget in budgets for limit in budget.limits):
        names.append(BENCH)
    return {name: digest_of_file(folder / name) for name in names if (folder / name).is_file()}


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
