"""What frozen encoders make of the training samples, computed once and read from disk in every epoch.

Knows samples, how their media are loaded, and encoders. Does not know compressors, draws, budgets or the optimizer.

Frozen encoders give the same features for the same input, and they are most of the cost of a step with a small LLM.
Augmentation changes the input, so `versions` of each sample are kept, each augmented by its own chance; epoch e reads
version e mod versions. With as many versions as epochs nothing but the speed changes.

    folder/fingerprint.json       per medium: encoder, transform, augmentation; features of anything else are refused
    folder/<medium>-<rank>.bin    features (T, D) after each other, float32
    folder/index-<rank>.jsonl     one line per sample and version: where its features are, and the files they are of

Each line is written after its features, so what a kill leaves behind is continued. Items whose encoder input is equal
(a clip in two tasks, a video under two noises of its sound) are encoded and kept once.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mllm.configuration import TOWER_NAMES
from mllm.data.dataset import ManifestDataset
from mllm.data.manifest import Sample
from mllm.encoders import SETTINGS as ENCODER_SETTINGS
from mllm.encoders import Encoder
from mllm.media import resolve_media
from mllm.modeling_body import SIZE_KEYS
from mllm.processing import ElasticProcessor, LoadedMedia, stack_media
from mllm.training.folders import run_lock
from mllm.training.settings import DataSettings
from mllm.transforms import random_generator

FINGERPRINT = "fingerprint.json"
ITEMS_PER_BATCH = 16
REMEMBERED_FILES = 8
"""Decoded files that are kept: the versions of a sample, and samples of several tasks, follow each other."""
Load = Callable[..., list[LoadedMedia]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """Where the features of one media item are: rows of a file, the raw length they are of, and the file's stamp."""

    medium: str
    file: str
    first_row: int
    num_rows: int
    raw_length: int
    stamp: str
    grid: Sequence[int] | None = None
    """Rows and columns of a picture, where pictures keep their shape."""


@dataclass
class FeatureStore:
    """The features in a folder.

    Args:
        folder: of all runs that share them.
        sizes: D of each medium.
        versions: of each sample.
        seed: of the chance of each version.
        entries: by (sample id, version) the items of the sample in order, or why it cannot be used.
    """

    folder: Path
    sizes: Mapping[str, int]
    versions: int
    seed: int
    entries: dict[tuple[str, int], list[Kept] | str] = field(default_factory=dict)

    def read_index(self) -> None:
        """Take in what all processes have written."""
        for file in sorted(self.folder.glob("index-*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # the last may be half written
                row = json.loads(line)
                found = row["error"] if "error" in row else [Kept(**own) for own in row["items"]]
                self.entries[row["id"], row["version"]] = found

    def missing(self, samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
        """The versions of samples that are not there, failed, or are of files that have changed since."""
        wanted = []
        for sample in samples:
            stamps = [_stamp(sample, path) for path in (part.path for part in sample.media)]
            for version in range(self.versions):
                found = self.entries.get((sample.id, version))
                if found is None or isinstance(found, str) or [own.stamp for own in found] != stamps:
                    wanted.append((sample, version))
        return wanted

    def load(self, sample: Sample, epoch: int) -> list[LoadedMedia]:
        """The features of a sample in place of its media, instead of `ElasticProcessor.load_media`.

        Raises:
            ValueError: the sample could not be loaded when its features were made; the reason is that of then.
        """
        found = self.entries[sample.id, epoch % self.versions]
        if isinstance(found, str):
            raise ValueError(found)
        return [
            LoadedMedia(own.medium, self._rows(own), own.raw_length, (own.grid[0], own.grid[1]) if own.grid else None)
            for own in found
        ]

    def _rows(self, own: Kept) -> Tensor:
        size = self.sizes[own.medium]
        rows = np.fromfile(
            self.folder / own.file,
            np.float32,
            count=own.num_rows * size,
            offset=4 * own.first_row * size,
        )
        return torch.from_numpy(rows.reshape(own.num_rows, size))


class FeatureDataset(ManifestDataset):
    """The samples of a manifest, their media taken from a store."""

    def __init__(self, samples: Sequence[Sample], store: FeatureStore) -> None:
        super().__init__(samples, load=_never)
        self.store = store

    def load_in(self, sample: Sample, epoch: int) -> list[LoadedMedia]:
        """The version of the epoch."""
        return self.store.load(sample, epoch)


def _never(sample: Sample, *, generator: np.random.Generator | None) -> Any:
    raise AssertionError(f"{sample.id} is read from a store")


class KeptFeatures(Encoder):
    """Stands where an encoder stood and passes its features through, so that the model need not know.

    Args:
        encoder: whose features come; only how it counts is kept of it.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__(nn.Identity())
        self.hidden_size: int = encoder.hidden_size
        for name in ("grid", "max_patches", "frames_per_second"):
            if hasattr(encoder, name):
                setattr(self, name, getattr(encoder, name))
        self._lengths: Callable[[Tensor], Tensor] | None = getattr(encoder, "lengths", None)
        _, lengths = encoder.smallest_input()
        self._smallest_length = lengths
        num_rows = encoder.grid[0] * encoder.grid[1] if lengths is None else int(encoder.lengths(lengths).max())
        self._smallest_rows = max(num_rows, 1)
        dtype = next(encoder.parameters()).dtype
        self.marker = nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False)  # says dtype and device

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Any:
        """(N, T, D) -> the same, with the true frames (N,) of streams, or patches of pictures that keep their shape."""
        if lengths is None:
            return values
        assert self._lengths is not None
        return values, self._lengths(lengths)

    def smallest_input(self) -> tuple[Tensor, Tensor | None]:
        """Features of nothing."""
        return torch.zeros(1, self._smallest_rows, self.hidden_size), self._smallest_length


def fill_store(
    store: FeatureStore,
    model: Any,
    samples: Sequence[Sample],
    load: Load,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    progress: bool = False,
) -> None:
    """Make what is missing in a store; every process makes its share, and reads those of the others afterwards.

    Args:
        model: with its encoders, on the device they run on.
        load: loads the media of a sample by a generator, see `mllm.data.dataset.Load`.

    Raises:
        ValueError: another process writes into the folder.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    store.read_index()
    # A share must not depend on what others have written by now.
    if missing := store.missing(samples[rank::num_ranks]):
        with run_lock(store.folder / f"lock-{rank}"):
            _Writer(store, model, load, rank).write(missing, progress=progress)


def claim(folder: Path, fingerprint: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a folder that of these features, or find that it is; the features of other media may be there too.

    Args:
        fingerprint: by medium, what its features depend on.

    Raises:
        ValueError: it holds others; what differs is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FINGERPRINT
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for medium, now in json.loads(json.dumps(dict(fingerprint))).items():
        kept = before.setdefault(medium, now)
        if changed := sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key)):
            words = "; ".join(f"{medium}.{key} was {kept.get(key)!r} and is {now.get(key)!r}" for key in changed)
            raise ValueError(
                f"data.features.folder {folder} holds features of something else ({words}); choose another"
            )
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(before, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(file)


def features_fingerprint(config: Any, processor: ElasticProcessor, data: DataSettings) -> dict[str, dict[str, Any]]:
    """What each medium's features depend on beside the samples: encoder, transform, augmentation and its chance."""
    assert data.features is not None
    noise = None if data.noise is None else hashlib.sha256(Path(data.noise).read_bytes()).hexdigest()
    augmentation = {
        "image": {},
        "audio": {"noise": noise, "snr_db": data.snr_db, "audio_mask_samples": data.audio_mask_samples},
        "video": {"flip_probability": data.flip_probability, "video_mask_frames": data.video_mask_frames},
    }
    return {
        medium: {
            "encoder": (config.sources or {}).get(medium, {}).get("sha256"),
            "settings": {key: own[key] for key in ENCODER_SETTINGS if key in own},
            "preprocessor": processor.elastic["media"][medium]["preprocessor"],
            "seed": data.features.seed,
            "video_backend": data.video_backend,
            "max_mismatch_seconds": data.max_mismatch_seconds,
            **augmentation[medium],
        }
        for medium, own in (config.media or {}).items()
    }


def pass_features_through(model: Any) -> None:
    """Put `KeptFeatures` in place of every encoder of a model, in place; their weights are let go."""
    for medium in model.model.compressors:
        name = TOWER_NAMES[medium]
        encoder = getattr(model.model, name)
        device = next(encoder.parameters()).device
        setattr(model.model, name, KeptFeatures(encoder).to(device))
        encoder.backbone.to("meta")


@dataclass
class _Writer:
    """Writes the features of one process."""

    store: FeatureStore
    model: Any
    load: Load
    rank: int
    seen: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def write(self, wanted: Sequence[tuple[Sample, int]], *, progress: bool) -> None:
        """Load, encode and write, batch by batch."""
        index = self.store.folder / f"index-{self.rank}.jsonl"
        _cut_half_line(index)
        bar = tqdm(total=len(wanted), desc="encoding", disable=not progress or self.rank > 0)
        with index.open("a", encoding="utf-8") as file:
            for start in range(0, len(wanted), ITEMS_PER_BATCH):
                batch = wanted[start : start + ITEMS_PER_BATCH]
                loaded = [self._load(sample, version) for sample, version in batch]
                self._encode([item for own in loaded if not isinstance(own, str) for item in own])
                for (sample, version), own in zip(batch, loaded, strict=True):
                    row = self._row(sample, version, own)
                    self.store.entries[sample.id, version] = (
                        row["error"] if "error" in row else [Kept(**item) for item in row["items"]]
                    )
                    file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update(len(batch))
        bar.close()

    def _load(self, sample: Sample, version: int) -> list[LoadedMedia] | str:
        generator = random_generator(self.store.seed, version, sample.id, "augmentation")
        try:
            return self.load(sample, generator=generator)
        except ValueError as error:
            return str(error) or type(error).__name__

    @torch.no_grad()
    def _encode(self, items: Sequence[LoadedMedia]) -> None:
        """Append the features of items that were not seen before to the files of their media."""
        new = {_digest(item): item for item in items if _digest(item) not in self.seen}
        for medium in self.store.sizes:
            own = {digest: item for digest, item in new.items() if item.medium == medium}
            if not own:
                continue
            inputs = stack_media(list(own.values()))
            tower = self.model.model.tower(medium)
            device = next(tower.parameters()).device
            values = next(value for name, value in inputs.items() if name.endswith("values")).to(device)
            lengths = inputs.get(SIZE_KEYS[medium])
            found = self.model.model.encode(medium, values, None if lengths is None else lengths.to(device))
            rows, counts = found.values.float().cpu().numpy(), found.lengths.cpu().tolist()
            self._append(medium, list(own), [rows[place, :count] for place, count in enumerate(counts)])

    def _append(self, medium: str, digests: Sequence[str], features: Sequence[np.ndarray]) -> None:
        name = f"{medium}-{self.rank}.bin"
        with (self.store.folder / name).open("ab") as file:
            row_bytes = 4 * self.store.sizes[medium]
            file.truncate(file.tell() // row_bytes * row_bytes)  # a kill may have left half a row
            first = file.seek(0, os.SEEK_END) // row_bytes
            for digest, own in zip(digests, features, strict=True):
                file.write(np.ascontiguousarray(own, np.float32).tobytes())
                self.seen[digest] = (name, first, len(own))
                first += len(own)

    def _row(self, sample: Sample, version: int, loaded: list[LoadedMedia] | str) -> dict[str, Any]:
        row: dict[str, Any] = {"id": sample.id, "version": version}
        if isinstance(loaded, str):
            return row | {"error": loaded}
        items = []
        for part, item in zip(sample.media, loaded, strict=True):
            file, first, count = self.seen[_digest(item)]
            stamp = _stamp(sample, part.path)
            items.append(asdict(Kept(item.medium, file, first, count, item.raw_length, stamp, item.grid)))
        return row | {"items": items}


def _digest(item: LoadedMedia) -> str:
    """What an encoder is fed with, in short."""
    content = hashlib.blake2b(item.values.numpy().tobytes(), digest_size=16)
    shape = tuple(item.values.shape) if item.grid is None else item.grid
    return f"{item.medium} {item.raw_length} {shape} {content.hexdigest()}"


def _stamp(sample: Sample, path: str) -> str:
    """Changes when a file does."""
    try:
        facts = resolve_media(sample.root, path).stat()
    except (OSError, ValueError) as error:
        return f"none: {type(error).__name__}"
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def _cut_half_line(file: Path) -> None:
    if file.exists():
        with file.open("rb+") as stream:
            content = stream.read()
            stream.truncate(content.rfind(b"\n") + 1)
