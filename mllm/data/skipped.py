"""Lists and counts samples that are skipped because they cannot be used, and stops the run at too many of them.

Knows ids and errors, and data loader workers. Does not know what a sample is for.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from mllm.media import MediaError
from mllm.utils.files import writing

logger = logging.getLogger(__name__)

MAX_WORKERS = 1_024
MIN_SEEN = 500
"""Of fewer samples as many may be bad as of so many: a handful is no reason to stop."""


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """Names a sample that is skipped, and why; `kind` is that of a `MediaError`, or "unusable" for any other reason."""

    sample_id: str
    epoch: int
    kind: str
    path: str
    reason: str

    @classmethod
    def of(cls, sample_id: str, epoch: int, error: ValueError) -> "SkippedSample":
        """Make one from the error that a sample gave."""
        if isinstance(error, MediaError):
            return cls(sample_id, epoch, error.kind, error.path, error.reason)
        return cls(sample_id, epoch, "unusable", "", str(error))


class TooManyBadSamples(RuntimeError):
    """Says that more samples are bad than `max_bad_fraction` allows."""


def too_many_bad(num_bad: int, num_seen: int, max_bad_fraction: float, *, min_seen: int | None = None) -> bool:
    """Say whether so many bad samples are a reason to stop: more than the fraction allows of those seen, or of
    `min_seen` as long as fewer were seen.

    Args:
        min_seen: where all samples are known and not one is good, it is a reason whatever this is; `MIN_SEEN` and that
            rule when left out.
    """
    if min_seen is None:
        return num_bad > max_bad_fraction * max(num_seen, MIN_SEEN) or (0 < num_seen <= num_bad)
    return num_bad > max_bad_fraction * max(num_seen, min_seen)


class SkipLog:
    """Lists skipped samples in a JSONL file and stops the run when there are too many.

    The run stops as soon as the bad ones are more than `max_bad_fraction` of the samples seen, or of `min_seen` as long
    as fewer were seen: a handful of bad files at the start is no reason to stop, a folder that is not mounted is, after
    that handful. Counts span all workers of one process and all its epochs, and start again when a run is resumed; a
    sample is listed once per epoch.

    Works in the workers themselves, so the run stops whoever reads the batches.

    Args:
        path: the file; lines are added to what is there. Give each training process its own.
        max_bad_fraction: 0 stops at the first bad sample.
        min_seen: see above.

    Raises:
        ValueError: a fraction outside 0..1, or min_seen below 0.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bad_fraction: float = 0.01, min_seen: int = MIN_SEEN
    ) -> None:
        if not 0 <= max_bad_fraction <= 1 or min_seen < 0:
            got = f"{max_bad_fraction} and {min_seen}"
            raise ValueError(f"max_bad_fraction must be 0 to 1 and min_seen at least 0, got {got}")
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.min_seen = min_seen
        # One row per worker, (seen, bad), so that no two of them ever write to the same number.
        self._counts = torch.zeros(MAX_WORKERS + 1, 2, dtype=torch.int64).share_memory_()

    @property
    def num_seen(self) -> int:
        """Count the samples seen so far, good and bad, by all workers."""
        return int(self._counts[:, 0].sum())

    @property
    def num_bad(self) -> int:
        """Count the bad samples among them."""
        return int(self._counts[:, 1].sum())

    def note(self, num_seen: int, bad: Sequence[SkippedSample]) -> None:
        """Count `num_seen` samples, of which `bad` are skipped.

        Raises:
            TooManyBadSamples: naming the file that lists them and the last one.
        """
        for sample in bad:
            logger.warning("sample %r is skipped: %s", sample.sample_id, sample.reason)
        if bad:
            # Before they count: another worker that stops the run names a file that lists all it counted.
            self._write(bad)
        worker = get_worker_info()
        row = 0 if worker is None else worker.id + 1
        self._counts[row] += torch.tensor([num_seen, len(bad)])
        if bad:
            self._check(bad[-1])

    def _write(self, bad: Sequence[SkippedSample]) -> None:
        rows = [
            {"id": one.sample_id, "epoch": one.epoch, "kind": one.kind, "path": one.path, "reason": one.reason}
            for one in bad
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode, so that lines of several workers do not mix.
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with writing(self.path, len(content)), open(self.path, "ab", buffering=0) as file:
            file.write(content)

    def _check(self, last: SkippedSample) -> None:
        seen, bad = self.num_seen, self.num_bad
        if too_many_bad(bad, seen, self.max_bad_fraction, min_seen=self.min_seen):
            raise TooManyBadSamples(
                f"{bad} of {seen} samples are bad, more than max_bad_fraction {self.max_bad_fraction:g} allows; "
                f"they are listed in {self.path}; the last: {last.sample_id!r}, {last.reason}"
            )
