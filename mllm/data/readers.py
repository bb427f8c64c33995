"""Reads every format that data come in, behind one call: a file or folder to samples, or to all that is wrong with it.

Knows which reader reads which format. Does not know what formats look like.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mllm.config.data import Format, ReaderConfig
from mllm.data.conversations import read_messages, read_sharegpt
from mllm.data.findings import BadRows, Finding, Listing, first
from mllm.data.guessing import naming_format, wrong_format
from mllm.data.llava import list_llava
from mllm.data.manifest import Sample, scan_manifest
from mllm.data.shards import read_webdataset
from mllm.data.speech.clip_folder import read_clips
from mllm.data.speech.file_lists import read_auto_avsr, read_fairseq, read_omni_csv
from mllm.data.speech.lrs import read_lrs
from mllm.data.tables import read_datasets, read_parquet
from mllm.data.vision.choices import read_mmbench, read_mme, read_pope, read_scienceqa, read_seedbench
from mllm.data.vision.documents import read_chartqa, read_docvqa
from mllm.data.vision.from_tables import read_ai2d, read_mmmu
from mllm.data.vision.short_answers import read_gqa, read_textvqa, read_vizwiz, read_vqav2
from mllm.media import MediaError, RootedPaths

logger = logging.getLogger(__name__)


def _read_rows(source: Path, root: Path, config: ReaderConfig) -> Listing:
    listing = Listing()
    for row in scan_manifest(source, root):
        for problem in row.problems:
            listing.note(source, row.line_number, problem)
        listing.samples += [] if row.sample is None else [row.sample]
    return listing


def _read_conversations(source: Path, root: Path, config: ReaderConfig) -> Listing:
    return list_llava(source, root, images_first=config.images_first)


READERS: dict[Format, Callable[[Path, Path, ReaderConfig], Listing]] = {
    "manifest": _read_rows,
    "llava": _read_conversations,
    "sharegpt": lambda source, root, _: read_sharegpt(source, root),
    "messages": lambda source, root, _: read_messages(source, root),
    "parquet": read_parquet,
    "datasets": read_datasets,
    "webdataset": lambda source, root, _: read_webdataset(source, root),
    "auto_avsr": read_auto_avsr,
    "omni_csv": read_omni_csv,
    "fairseq": read_fairseq,
    "lrs": read_lrs,
    "clips": read_clips,
    "vqav2": read_vqav2,
    "gqa": read_gqa,
    "textvqa": read_textvqa,
    "pope": read_pope,
    "scienceqa": read_scienceqa,
    "mme": read_mme,
    "mmbench": read_mmbench,
    "vizwiz": read_vizwiz,
    "seedbench": read_seedbench,
    "chartqa": read_chartqa,
    "docvqa": read_docvqa,
    "mmmu": read_mmmu,
    "ai2d": read_ai2d,
}


def read_listing(source: str | os.PathLike[str], root: str | os.PathLike[str], config: ReaderConfig) -> Listing:
    """Read everything in a file or folder: samples, and a finding for each row that cannot be used.

    Whatever stands in the data becomes a finding, also what spoils a whole file; where no sample is left, the first
    finding names the format that the file seems to have.

    Raises:
        OSError: the file or folder cannot be read.
        ValueError: a folder is no format of files, or a file none of folders; what it seems to be is named.
    """
    listing = Listing()  # what remains where the file as a whole raises
    with naming_format(source, config.format), listing.noting(source, is_whole=True):
        listing = READERS[config.format](Path(source), Path(root), config)
    if not listing.samples and (hint := wrong_format(Path(source), config.format)):
        listing.problems.insert(0, Finding(os.fspath(source), None, hint, is_of_file=True))
    return listing


def read_data(
    source: str | os.PathLike[str], root: str | os.PathLike[str] | None, config: ReaderConfig
) -> list[Sample]:
    """Read the samples of a file or folder, to train or evaluate on.

    Files that are named and not there are logged and their samples kept: a run lists and leaves out what it cannot
    read, and stops when that is too much.

    Args:
        root: folder that media paths are relative to; None for `default_root`.

    Raises:
        BadRows: rows that cannot be used, a line for each of the first of them with its place.
        ValueError: there is no sample.
        OSError: the file or folder cannot be read.
    """
    root = default_root(source) if root is None else Path(root)
    listing = read_listing(source, root, config)
    if listing.problems:
        raise BadRows(listing.problems)
    if not listing.samples:
        raise ValueError(f"{os.fspath(source)}: there is no sample in it")
    if listing.missing:
        logger.warning("%d files are missing:\n%s", len(listing.missing), "\n".join(first(listing.missing)))
    if listing.untranscribed:
        logger.warning("%d clips have no transcript and are left out", len(listing.untranscribed))
    return listing.samples


def note_missing(listing: Listing, source: Path) -> None:
    """Look up the media of samples whose reader does not, and note those that cannot be opened."""
    for sample, message in missing_media(listing.samples):
        listing.missing.append(Finding(os.fspath(source), None, message))
        listing.incomplete.add(sample.id)


def missing_media(samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
    """Yield samples with a medium that cannot be opened, and which and why; every file is looked up once, none is
    opened.
    """
    roots: dict[str, RootedPaths] = {}
    for sample in samples:
        paths = roots.setdefault(str(sample.root), RootedPaths(sample.root))
        for part in sample.media:
            try:
                paths.resolve(part.path)
            except MediaError as error:
                yield sample, f"sample {sample.id!r}: {part.medium} {part.path}: {error.reason}"


def default_root(source: str | os.PathLike[str]) -> Path:
    """Return the folder that media paths are relative to when none is given: the folder itself, or the file's own. Data
    of a hub lie below a folder of their own, which their samples name.
    """
    path = Path(source)
    return path if path.is_dir() else path.parent
