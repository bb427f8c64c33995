"""`mllm data check` reports everything that is wrong with a manifest, in one pass."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm.config.data import Format, ReaderConfig
from mllm.data.findings import first_lines
from mllm.media import MediaLimits, MediaLoader

if TYPE_CHECKING:
    from mllm.data.check import Report

SUMMARY = "Report every bad row of a manifest, or of data in another format, with its line."
POSITIONAL = "manifest"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Check every row of a manifest, and that the files it names are there."""

    manifest: str
    """Manifest (JSONL), or a file or folder of another format."""
    format: Format | None = None
    """Format of the data; what the recipe says, or else a manifest, when left out."""
    root: str | None = None
    """Folder that media paths are relative to; the recipe's, or the manifest's own, when left out."""
    open: bool = False
    """Decode every file too, which takes as long as an epoch of reading does."""
    limits: MediaLimits | None = None
    """Pixels, seconds and bytes beyond which a file is refused; the recipe's, or the usual ones, when left out."""
    recipe: str | None = None
    """Run config (YAML) whose target tokens per sample are counted too, on 10,000 samples evenly taken where there are
    more; needs its LLM's tokenizer and the configs of its encoders."""


def run(settings: Settings) -> int:
    """Check, and return 1 when something is wrong."""
    from mllm.commands.terminal import console
    from mllm.data.check import check_listing, check_manifest
    from mllm.data.readers import default_root

    recipe = None if settings.recipe is None else _read(settings.recipe)
    root = settings.root or (recipe.data.root if recipe else None) or default_root(settings.manifest)
    reader = _reader(settings.format, recipe)
    loader = MediaLoader(limits=settings.limits or (recipe.data.limits if recipe else MediaLimits()))
    if reader.format == "manifest":
        report = check_manifest(settings.manifest, root, open_media=settings.open, loader=loader)
    else:
        report = check_listing(settings.manifest, root, reader, open_media=settings.open, loader=loader)
    out = console()
    for line in _lines_of(report):
        out.print(line, soft_wrap=True)
    out.print(report.summary(), soft_wrap=True)
    if recipe is not None and report.num_samples:
        out.print(_targets(settings.manifest, root, recipe, reader), soft_wrap=True)
    return 0 if report.is_good else 1


def _lines_of(report: "Report") -> list[str]:
    """Write every problem in a line; only the first where no row is good, as of a file that is something else."""
    lines = [
        f"{report.path if problem.line_number is None else f'{report.path}:{problem.line_number}'}: {problem.message}"
        for problem in report.problems
    ]
    return lines if report.num_samples else first_lines(lines)


def _reader(named: Format | None, recipe: Any) -> ReaderConfig:
    """Take what the recipe says, unless another format is named."""
    if recipe is not None and named in (None, recipe.data.reader.format):
        return recipe.data.reader
    return ReaderConfig(format=named or "manifest")


def _read(path: str) -> Any:
    from pathlib import Path

    import yaml

    from mllm.config.run import read_run_config

    return read_run_config(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


def _targets(manifest: str, root: Any, recipe: Any, reader: ReaderConfig) -> str:
    """Write in a line what a run of the recipe would learn from these samples.

    Raises:
        ValueError: too many have no target token.
    """
    from mllm.checkpoints.build import build_processor
    from mllm.data.readers import read_listing
    from mllm.training.pipeline.token_scan import (
        FIRST_SCAN,
        check_targets,
        count_targets,
        evenly_sampled,
        target_report,
    )

    every = read_listing(manifest, root, reader).samples  # what is wrong with the others has been reported
    samples = [every[number] for number in evenly_sampled(len(every), FIRST_SCAN)]
    counted = count_targets(samples, build_processor(recipe.model).chat)
    ids, targets = [sample_id for sample_id, _ in counted], [count for _, count in counted]
    if not ids:
        raise ValueError("the chat format of the recipe (model.chat_format) has no place for any of the samples")
    check_targets(ids, targets, recipe.data.max_unsupervised_fraction)
    refused = len(samples) - len(ids)
    left_out = f"; the chat format has no place for {refused} more" if refused else ""
    of = "" if len(samples) == len(every) else f" (of {len(every)}, evenly taken)"
    return f"{target_report(ids, targets)}{left_out}{of}"
