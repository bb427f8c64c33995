"""`mllm prepare lips` turns recordings of talking people into mouth crops and audio."""

from pathlib import Path
from typing import TYPE_CHECKING

from mllm.lip_crops.config import LipCropsConfig as Settings

if TYPE_CHECKING:
    from mllm.lip_crops.run import Prepared

__all__ = ["POSITIONAL", "SUMMARY", "Settings", "run"]

SUMMARY = "Cut mouth crops and 16 kHz audio out of recordings of talking people."
POSITIONAL = "source"
MAX_SHOWN = 10


def run(settings: Settings) -> int:
    """Prepare, and name what could not be used; return 1 where there was any."""
    from mllm.commands.terminal import console, progress_bar
    from mllm.lip_crops.run import prepare

    with progress_bar() as show:
        prepared = prepare(settings, progress=show)
    for line in summary(prepared, settings.out):
        console().print(line, soft_wrap=True)
    return 0 if len(prepared.with_status("done")) == len(prepared.rows) else 1


def summary(prepared: "Prepared", out: str) -> list[str]:
    """Write lines for the terminal: what is not used and why, counts, and what to look at."""
    unused = [row for row in prepared.rows if row["status"] != "done"]
    lines = [f"{row['status']}: {row['source']}: {row['reason']}" for row in unused[:MAX_SHOWN]]
    if len(unused) > MAX_SHOWN:
        lines.append(f"and {len(unused) - MAX_SHOWN} more; see {out}/prepare.jsonl")
    done = prepared.with_status("done")
    counts = [f"{len(prepared.with_status(status))} {status}" for status in ("done", "skipped", "failed")]
    lines.append(f"{', '.join(counts)}; {prepared.num_new} of them now")
    if silent := sum(not row["audio"] for row in done):
        lines.append(f"{silent} without audio: only the crop was written")
    if prepared.num_samples:
        lines.append(f"manifest: {out}/manifest.jsonl, {prepared.num_samples} rows")
    else:
        lines.append("manifest.jsonl is empty: no recording has a .txt with its transcript beside it")
    if (Path(out) / "contact_sheet.png").is_file():
        lines.append(f"look at {out}/contact_sheet.png")
    return lines
