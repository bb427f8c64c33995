"""Fits a router on the answers of an evaluation at fixed budgets, after making sure that they may be used for it.

Knows evaluations, manifests and models. How heads are fitted is in `mllm.router`.

Answers must be this very model's, at trained budgets, to questions it was not trained on: on its own training pictures
a model is right more often, and the router would spare tokens that unseen pictures need.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mllm.budget import Space
from mllm.checkpoints.model_files import changed_files, fingerprint_of_model
from mllm.config.router import RouterFitConfig
from mllm.data.manifest import Sample
from mllm.data.readers import read_data
from mllm.evaluation.answer_store import FINGERPRINT, HYPOTHESES, Line
from mllm.evaluation.answer_table import tables_of
from mllm.evaluation.noise import EvaluationNoise, noise_of_answers
from mllm.evaluation.request_costs import ModelCosts
from mllm.inference.decoding import Decoding
from mllm.inference.growth import grows
from mllm.media import MediaLoader, resolve_media
from mllm.media.limits import digest_of_media
from mllm.processing.processor import ElasticProcessor
from mllm.router.features import MediaSet, features_of
from mllm.router.router import Router, fit_media_router
from mllm.router.table import AnswerTable
from mllm.utils.files import digest_of_file
from mllm.utils.run_paths import RUN_CONFIG, run_of

SampleKey = tuple[str, str]
"""Set and sample."""
Progress = Callable[[int, int], None]
"""Called with how many questions have been described, and how many there are."""


@dataclass(frozen=True)
class Answers:
    """Holds the answers of an evaluation, the samples they are about, and the noise they were heard under."""

    lines: list[Line]
    samples: dict[SampleKey, Sample]
    noise: EvaluationNoise | None = None


def read_answers(settings: RouterFitConfig) -> Answers:
    """Read answers that a router may be fitted on.

    Raises:
        FileNotFoundError: the folder holds no finished evaluation, or there is no such manifest.
        ValueError: another model's answers, manifests that are not those that were evaluated, ones that the model was
            trained on, or answers under noise that is not named.
    """
    folder = Path(settings.answers)
    if not (folder / HYPOTHESES).is_file():
        raise FileNotFoundError(f"{folder} holds no {HYPOTHESES}; answers names the folder of a finished evaluation")
    fingerprint = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
    if changed := changed_files(fingerprint["model"], fingerprint_of_model(settings.model_folder)):
        raise ValueError(f"{folder} holds answers of another model than {settings.model}: {', '.join(changed)} differ")
    for manifest in settings.manifest:
        refuse_training_data(manifest, settings.model_folder)
    names = settings.set_names
    samples = {
        (name, sample.id): sample
        for name, manifest in zip(names, settings.manifest, strict=True)
        for sample in read_data(manifest, settings.root, settings.reader)
    }
    lines = [json.loads(line) for line in (folder / HYPOTHESES).read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["set"] in names]
    if not kept:
        sets = ", ".join(sorted({line["set"] for line in lines}))
        raise ValueError(f"{folder} holds answers to {sets}, and not to {', '.join(names)}")
    if missing := [line["id"] for line in kept if (line["set"], line["id"]) not in samples]:
        raise ValueError(f"the manifests do not hold sample {missing[0]!r} of {folder}; name those that were evaluated")
    noise = noise_of_answers(fingerprint, settings.noise, settings.limits, folder=settings.answers)
    return Answers(kept, samples, noise)


def refuse_training_data(manifest: str, model_folder: Path) -> None:
    """Refuse a manifest that a model was trained on; only a run folder knows which those are.

    Raises:
        ValueError: the same file, or a copy of it.
    """
    run_config = run_of(model_folder) / RUN_CONFIG
    if not run_config.is_file():
        return
    data = yaml.safe_load(run_config.read_text(encoding="utf-8")).get("data", {})
    for trained in (*data.get("train", []), *data.get("captions", [])):
        same_path = Path(trained).resolve() == Path(manifest).resolve()
        are_files = Path(trained).is_file() and Path(manifest).is_file()
        if same_path or (are_files and digest_of_file(trained) == digest_of_file(manifest)):
            raise ValueError(
                f"manifest {manifest} is what the model was trained on ({trained}), where it is right more often than "
                "elsewhere; fit the router on answers to other questions"
            )


def fit_router(
    settings: RouterFitConfig, model: Any, processor: ElasticProcessor, *, progress: Progress = lambda done, total: None
) -> Router:
    """Fit a router for every set of media that the answers are about.

    Args:
        model: an `ElasticForConditionalGeneration`, the one that answered.
        processor: the one that belongs to it.

    Raises:
        MediaError: a file that cannot be read any more.
        ValueError: as `read_answers`, budgets that were not trained, or too few media.
    """
    tables = described_tables(settings, model, processor, progress=progress)
    by_media = {media: fit_media_router(table, is_nested=is_nested) for media, (table, is_nested) in tables.items()}
    return Router(by_media, fingerprint_of_model(settings.model_folder))


def described_tables(
    settings: RouterFitConfig, model: Any, processor: ElasticProcessor, *, progress: Progress = lambda done, total: None
) -> dict[MediaSet, tuple[AnswerTable, bool]]:
    """Make a table with features of the answers about each set of media, and say whether their budgets are nested.

    Raises:
        MediaError: a file that cannot be read any more.
        ValueError: as `read_answers`, or budgets that were not trained.
    """
    answers = read_answers(settings)
    tables = {}
    for media, table in tables_of(answers.lines, answers.samples).items():
        _check_trained(table, processor.space)
        described = with_features(table, answers, model, processor, folder=settings.model_folder, progress=progress)
        tables[media] = described, media == ("image",) and grows(model, processor, Decoding())
    return tables


def with_features(
    table: AnswerTable,
    answers: Answers,
    model: Any,
    processor: ElasticProcessor,
    *,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> AnswerTable:
    """Return a table with the features of its questions; media are decoded for their sizes, and not encoded.

    Where `mllm bench` measured all of its budgets, it also has their milliseconds, of the encoder and the prompt.

    Its media keys are digests of the files' bytes: the same image under another path is the same image, when it is told
    whether a router has seen it.

    Args:
        answers: that the table was made of.
        folder: of the model.

    Raises:
        MediaError: a file that cannot be read any more.
    """
    loader = MediaLoader(gray=True, limits=processor.limits)
    placeholders = list(processor.placeholder_ids.values())
    rows = []
    contents: dict[Hashable, str] = {}
    samples, snrs_db = answers.samples, table.snrs_db or (None,) * len(table)
    for number, (key, snr_db) in enumerate(zip(table.sample_keys, snrs_db, strict=True)):
        sample = samples[key]
        if sample.media_key not in contents:
            files = (resolve_media(sample.root, part.path) for part in sample.media)
            contents[sample.media_key] = "+".join(map(digest_of_media, files))
        noise = None if snr_db is None or answers.noise is None else answers.noise.of(sample.id, snr_db)
        media = processor.load_media(sample, loader=loader, noise=noise)
        row = processor.batch([sample], [media], for_training=False, with_values=False).rows[0]
        rows.append(features_of(model, row, placeholders))
        progress(number + 1, len(table))
    milliseconds = ModelCosts(model, processor, folder).milliseconds_of(table.budgets)
    return replace(
        table,
        milliseconds=None if milliseconds is None else np.tile(milliseconds, (len(table), 1)),
        media_keys=tuple(contents[samples[key].media_key] for key in table.sample_keys),
        features={name: np.stack([row[name] for row in rows]) for name in rows[0]},
    )


def _check_trained(table: AnswerTable, space: Space) -> None:
    for budget in table.budgets:
        if budget.is_open or not space.is_trained(budget):
            trained = "; ".join(f"{medium}: {', '.join(map(str, one.choices))}" for medium, one in space.media.items())
            raise ValueError(
                f"the answers are at {budget}, and a router chooses among trained budgets only ({trained})"
            )
