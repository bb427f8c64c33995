"""`mllm data import` turns clips, conversations and vision benchmarks, in the forms others write them, into our
manifest."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.config.data import BENCHMARK_FORMATS, CONVERSATION_FORMATS, Format, ReaderConfig, SpeechTask, TextForm

if TYPE_CHECKING:
    from mllm.data.findings import Listing

SUMMARY = "Make a manifest of conversations, clips or a vision benchmark in another form."
POSITIONAL = ("format", "source")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Make a manifest; report everything that cannot be taken over with its line, and write the rest."""

    format: Format
    """Format of the source: conversations of LLaVA, ShareGPT, or OpenAI and ms-swift (messages), parquet files, Hugging
    Face datasets or WebDataset tars (docs/data.md); a list of auto_avsr, Llama-AVSR or Omni-AVSR (omni_csv),
    fairseq's tsv, a list of LRS2 or a folder of LRS3, a folder of one's own clips; or a vision benchmark
    (docs/evaluation.md)."""
    source: str
    """List or folder to read."""
    out: str
    """Manifest (JSONL) to write."""
    root: str | None = None
    """Folder that media paths are relative to and cannot leave. When left out, the source's own folder, and paths are
    written relative to the manifest's folder where that is above it, so that whatever reads the manifest finds them."""
    tasks: str = ""
    """Tasks, with commas between, of asr (audio), vsr (video), avsr (both); all a clip's media allow when left out."""
    text: TextForm = "as_is"
    """Form of transcripts: as they are, in lower case, or as words: in lower case, letters, marks and digits of every
    script and apostrophes inside words alone."""
    prompts: dict[SpeechTask, str] = field(default_factory=dict)
    """Questions by task, in place of the prompts of Llama-AVSR and Omni-AVSR."""
    transcripts: str | None = None
    """CSV or TSV of clip and transcript (format clips), or the folder of the text files (format auto_avsr)."""
    max_seconds: float | None = None
    """Longest clip in seconds (format lrs): a longer one is refused, or cut where `segments` is set."""
    segments: str | None = None
    """Folder, relative to the root, that clips longer than max_seconds are cut into (format lrs)."""
    untranscribed: str | None = None
    """Text file to write the clips without a transcript into, one path per line (format clips)."""

    images: str | None = None
    """Folder of images, relative to the root, where it is not the usual one (vision benchmarks); images that stand
    inside a table are written there."""
    annotations: str | None = None
    """File with the answers (pope: its folder), where it is not beside the questions (vision benchmarks)."""
    ocr_tokens: bool = True
    """Leave the words that an OCR read in the question, as LLaVA does (format textvqa)."""
    split: str | None = None
    """Split of tables (parquet, arrow), where it is not train, or of a benchmark the one that papers print."""

    def __post_init__(self) -> None:
        if self.format == "manifest":
            raise ValueError("format is manifest, which is what this writes; there is nothing to import")
        if (self.segments is not None) and self.max_seconds is None:
            raise ValueError("segments is set, but max_seconds is not; it says how long a piece may be")
        if self.untranscribed is not None and self.format != "clips":
            raise ValueError(f"untranscribed goes with the format clips, not {self.format}")
        self.reader  # noqa: B018 (refuses what contradicts itself)

    @property
    def reader(self) -> ReaderConfig:
        """The config of the reader."""
        tasks = [task.strip() for task in self.tasks.split(",") if task.strip()]
        if unknown := [task for task in tasks if task not in ("asr", "vsr", "avsr")]:
            raise ValueError(f"tasks must be asr, vsr or avsr, parted by commas; got {unknown[0]!r}")
        return ReaderConfig(
            format=self.format,
            tasks=tasks,  # type: ignore[arg-type]
            text=self.text,
            prompts=self.prompts,
            transcripts=self.transcripts,
            max_seconds=self.max_seconds,
            images=self.images,
            annotations=self.annotations,
            ocr_tokens=self.ocr_tokens,
            split=self.split,
        )


def run(settings: Settings) -> int:
    """Read, report what is wrong, write what is right; return 1 when something is wrong."""
    from mllm.commands.terminal import console
    from mllm.data.manifest import write_manifest
    from mllm.data.readers import default_root
    from mllm.utils.files import write_text_whole

    root = default_root(settings.source) if settings.root is None else Path(settings.root)
    listing = _read(settings, root)
    note = None if settings.root is not None else _move_root(listing, Path(settings.out).parent)
    out = console()
    for finding in (*listing.problems, *listing.missing):
        out.print(str(finding), soft_wrap=True)
    for path in listing.untranscribed:
        out.print(f"{path}: no transcript", soft_wrap=True)
    if settings.untranscribed is not None:
        write_text_whole(settings.untranscribed, "".join(f"{path}\n" for path in listing.untranscribed))
    whole = listing.whole
    if not whole:
        raise ValueError(f"{settings.source}: there is no sample to write; {len(listing.problems)} problems")
    write_manifest(settings.out, whole)
    out.print(_summary(settings, listing), soft_wrap=True)
    if note is not None:
        out.print(note, soft_wrap=True)
    return 1 if listing.problems or listing.missing else 0


def _read(settings: Settings, root: Path) -> "Listing":
    from mllm.data.findings import Listing
    from mllm.data.readers import note_missing, read_listing
    from mllm.data.speech.lrs import read_lrs
    from mllm.data.speech.segmenting import Cutter
    from mllm.media import path_problem

    source = Path(settings.source)
    if settings.segments is None:
        listing = read_listing(source, root, settings.reader)
        if settings.format in (*CONVERSATION_FORMATS, *BENCHMARK_FORMATS):
            note_missing(listing, source)
        return listing
    if problem := path_problem(settings.segments):
        raise ValueError(f"segments: {problem}, got {settings.segments!r}")
    listing = Listing()
    with listing.noting(source, is_whole=True):
        listing = read_lrs(source, root, settings.reader, cut=Cutter(root, settings.segments))
    return listing


def _move_root(listing: "Listing", folder: Path) -> str | None:
    """Make paths relative to the manifest's folder; return what to say where that folder is not above them."""
    from mllm.data.manifest import rerooted

    roots = {sample.root for sample in listing.samples}
    outside = [root for root in roots if not Path(os.path.abspath(root)).is_relative_to(os.path.abspath(folder))]
    if outside:
        return f"media paths are relative to {outside[0]}: give --root or data.root where this manifest is read"
    listing.samples = [rerooted(sample, folder) for sample in listing.samples]
    return None


def _summary(settings: Settings, listing: "Listing") -> str:
    whole = listing.whole
    tasks = {task: sum(sample.task == task for sample in whole) for task in sorted({sample.task for sample in whole})}
    lines = [f"{settings.out}: {len(whole)} samples ({', '.join(f'{task} {n}' for task, n in tasks.items())})"]
    if listing.problems or listing.missing:
        left_out = len(listing.samples) - len(whole)
        lines.append(
            f"problems: {len(listing.problems)}; missing files: {len(listing.missing)}, of {left_out} samples that "
            "were left out"
        )
    if listing.untranscribed:
        lines.append(f"without a transcript: {len(listing.untranscribed)} files, fit for inference only")
    return "\n".join(lines)
