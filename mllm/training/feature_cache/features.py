"""Encodes training samples once with the frozen encoders, and reads the features from disk in every epoch.

Knows samples, how their media are loaded, and encoders. Does not know sampled budgets or the optimizer, nor how
features lie on disk (`store.py` does).

Frozen encoders give the same features for the same input, and they are most of the cost of a step with a small LLM.
Augmentation changes the input, so `versions` of each sample are kept, each augmented differently; epoch e reads
version e mod versions. With as many versions as epochs nothing but the speed changes.

A stream whose compressor averages frames, at rates that are all multiples of one, may be kept averaged at that one: the
mean of the means of equal windows is the mean.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mllm.budget import MEDIA, Budget
from mllm.config.reading import plain
from mllm.config.run import RunConfig
from mllm.data.dataset import ManifestDataset
from mllm.data.manifest import Sample
from mllm.data.shared_media import with_media
from mllm.encoders import Encoder
from mllm.model.configuration import TOWER_NAMES
from mllm.model.media_arguments import SIZE_KEYS
from mllm.processing.processor import ElasticProcessor, LoadedMedia, stack_media
from mllm.training.feature_cache.store import FeatureStore, KeptItem, ShardWriter, kept_items, key_of
from mllm.training.run_folder import run_lock
from mllm.training.throughput import Stopwatch
from mllm.utils.files import digest_of_file
from mllm.utils.random_generator import random_generator

ITEMS_PER_BATCH = 16
REMEMBERED_FILES = 8
"""Decoded files that are kept: the versions of a sample, and samples of several tasks, follow each other."""
Load = Callable[..., list[LoadedMedia]]


class FeatureDataset(ManifestDataset):
    """Holds the samples of a manifest, their media taken from a store, or some of them.

    Args:
        kept: the media that are in the store.
        load: loads the others from their files, see `mllm.data.dataset.Load`.
        seed: of the augmentation of those; None never augments.
        groups: see `ManifestDataset`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        store: FeatureStore,
        watch: Stopwatch | None = None,
        *,
        kept: Collection[str],
        load: Load,
        seed: int | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(samples, load=load, seed=seed, groups=groups)
        self.store = store
        self.watch = watch or Stopwatch()
        self.kept = frozenset(kept)

    def load_in(self, samples: Sequence[Sample], epoch: int, name: str) -> list[list[LoadedMedia]]:
        """Load the version of the epoch. What is kept once, since its encoder input was the same, comes once."""
        known: dict[str, LoadedMedia] = {}
        from_store: list[list[LoadedMedia]] = []
        with self.watch.measure("decode"):
            for sample in samples:
                part = with_media(sample, self.kept)
                from_store.append(self.store.load(part, epoch, known) if part.media else [])
        others = [with_media(sample, set(MEDIA) - self.kept) for sample in samples]
        to_read = [sample for sample in others if sample.media]
        from_files = iter(super().load_in(to_read, epoch, name) if to_read else [])
        return [
            _in_order(sample, kept, next(from_files) if other.media else [], self.kept)
            for sample, kept, other in zip(samples, from_store, others, strict=True)
        ]


def _in_order(
    sample: Sample, from_store: Sequence[LoadedMedia], from_files: Sequence[LoadedMedia], kept: Collection[str]
) -> list[LoadedMedia]:
    """Put the items of a sample in the order it shows them."""
    stored, read = iter(from_store), iter(from_files)
    return [next(stored if part.medium in kept else read) for part in sample.media]


class KeptFeatures(Encoder):
    """Passes features through in place of the encoder that made them, so that the model need not know.

    Args:
        encoder: the one whose features come; only how it counts is kept of it.
        pooled_frames: frames that each row of a stream is the mean of. The row is repeated as often, so that what
            follows counts frames as ever; frames that filled no row are left out, as they fill no window either.
    """

    def __init__(self, encoder: Any, pooled_frames: int = 1) -> None:
        super().__init__(nn.Identity())
        self.pooled_frames = pooled_frames
        self.hidden_size: int = encoder.hidden_size
        for name in ("grid", "max_patches", "frames_per_second"):
            if hasattr(encoder, name):
                setattr(self, name, getattr(encoder, name))
        self._lengths: Callable[[Tensor], Tensor] | None = getattr(encoder, "lengths", None)
        _, lengths = encoder.smallest_input()
        self._smallest_length = lengths
        num_rows = encoder.grid[0] * encoder.grid[1] if lengths is None else int(encoder.lengths(lengths).max())
        self._smallest_rows = max(num_rows // pooled_frames, 1)
        # Says dtype and device: float32 whatever the encoder computed in, so that means of its frames are not rounded.
        self.marker = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Any:
        """(N, T / pooled, D) -> (N, T, D), with the true frames (N,) of streams, or patches of images that keep their
        shape."""
        if lengths is None:
            return values
        assert self._lengths is not None
        frames = self._lengths(lengths)
        if self.pooled_frames > 1:
            values = values.repeat_interleave(self.pooled_frames, dim=1)
            frames = frames // self.pooled_frames * self.pooled_frames
        return values, frames

    def smallest_input(self) -> tuple[Tensor, Tensor | None]:
        """Return features of a smallest input."""
        return torch.zeros(1, self._smallest_rows, self.hidden_size), self._smallest_length


@dataclass(frozen=True)
class Form:
    """Says how features are kept.

    Args:
        fingerprint: by medium, what they depend on.
        dtype: `float32` or `bfloat16`.
        pooled: by medium, how many frames are averaged to one row; 1 where it is not named.
        num_workers: processes that decode beside the one that encodes.
    """

    fingerprint: Mapping[str, Mapping[str, Any]]
    dtype: str = "float32"
    pooled: Mapping[str, int] = field(default_factory=dict)
    num_workers: int = 0

    def changes(self, medium: str) -> bool:
        """Tell whether the seed of a sample's version changes the encoder's input; videos are cropped by it."""
        facts = self.fingerprint[medium]
        if facts.get("seed") is None:
            return False
        return medium == "video" or any(facts.get(key) for key in ("noise", "audio_mask_samples"))

    def of(self, features: Tensor, medium: str) -> Tensor:
        """Bring (T, D) float32 features into the form they are kept in, on the host; frames that fill no row go."""
        frames = self.pooled.get(medium, 1)
        if frames > 1:
            num_rows = len(features) // frames
            features = features[: num_rows * frames].unflatten(0, (num_rows, frames)).mean(dim=1)
        return features.to(device="cpu", dtype=getattr(torch, self.dtype), copy=True)


def fill_store(
    store: FeatureStore,
    model: Any,
    samples: Sequence[Sample],
    load: Load,
    *,
    form: Form,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Make what is missing in a store; every process makes its part, and reads those of the others afterwards.

    Args:
        model: with its encoders, on the device they run on.
        load: loads the media of a sample by a generator, see `mllm.data.dataset.Load`.
        progress: is called with how many of how many samples and versions of this part are done.

    Returns:
        How many samples and versions were missing in this part.

    Raises:
        ValueError: another process writes into the folder.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    store.read_index()
    # A part must not depend on what others have written by now.
    missing = store.missing(part_of_rank(samples, rank, num_ranks))
    if missing or store.renewed:
        with run_lock(store.folder / f"lock-{rank}"):
            _Filler(model, load, form, ShardWriter(store, rank)).write(store, missing, progress)
    return len(missing)


def part_of_rank(samples: Sequence[Sample], rank: int, num_ranks: int) -> list[Sample]:
    """List the samples a process encodes: all that begin with one clip, whatever their task, go to one process."""
    return [sample for sample in samples if _rank_of(sample, num_ranks) == rank]


def _rank_of(sample: Sample, num_ranks: int) -> int:
    name = str(Path(sample.media[0].path).with_suffix("")) if sample.media else sample.id
    return crc32(name.encode()) % num_ranks


def form_of(config: Any, processor: ElasticProcessor, run_config: RunConfig, *, augmented: bool = True) -> Form:
    """Say how a run keeps its features, and what they depend on beside the samples.

    Args:
        augmented: of the samples it trains on; those it validates on stay as they are.

    Raises:
        ValueError: a medium of `data.features.pooled` whose features must stay whole; with the reason.
    """
    features, data = run_config.data.features, run_config.data
    assert features is not None
    # Validation reads the same rows, at the same points.
    pooled = {medium: pooled_frames(medium, config, run_config.sampler.budgets) for medium in features.pooled}
    noise = None if data.noise is None else digest_of_file(data.noise)
    augmentation = {
        "image": {},
        "audio": {"noise": noise, "snr_db": data.snr_db, "audio_mask_samples": data.audio_mask_samples},
        "video": {"flip_probability": data.flip_probability, "video_mask_frames": data.video_mask_frames},
    }
    fingerprint = {
        medium: {
            "encoder": (config.sources or {}).get(medium, {}).get("sha256"),
            "settings": plain(block.encoder),
            "computed_in": run_config.model.dtype,
            "preprocessor": processor.preprocessor(medium),
            "seed": features.seed if augmented else None,
            "video_backend": data.video_backend,
            "max_mismatch_seconds": data.max_mismatch_seconds,
            "dtype": features.dtype,
            "pooled_frames": pooled.get(medium, 1),
            **(augmentation[medium] if augmented else {}),
        }
        for medium, block in config.encoded_media.items()
        if medium in run_config.kept_media
    }
    return Form(fingerprint, features.dtype, pooled, data.num_workers)


def pooled_frames(medium: str, config: Any, points: Sequence[Budget]) -> int:
    """Find the frames that every trained rate of a medium is a multiple of: what its features may be averaged over.

    Raises:
        ValueError: no frames can be averaged, or soft tokens would not be the same.
    """
    key, block = f"data.features.pooled names {medium}", config.encoded_media.get(medium)
    if block is None:
        raise ValueError(f"{key}, but model.{medium} is not set")
    space = config.space.media[medium]
    if block.compressor.kind != "pool" or getattr(block.projector, "before_pooling", False):
        raise ValueError(f"{key}, whose compressor does not average what its encoder gives; leave it out")
    amounts = [*space.trained, *(point.amounts[medium] for point in points if medium in point.amounts)]
    if other := [amount for amount in amounts if amount.kind not in ("rate", "max", "none")]:
        raise ValueError(f"{key}, which trains at {other[0]}; only streams at rates such as /4 can be kept pooled")
    rates = [int(amount.value) for amount in amounts if amount.kind == "rate"]
    if (frames := math.gcd(*rates)) == 1:
        words = ", ".join(f"/{rate}" for rate in dict.fromkeys(rates))
        raise ValueError(f"{key}, whose rates {words} are multiples of no common one, so every frame is needed")
    return frames


def pass_features_through(model: Any, media: Iterable[str], pooled: Mapping[str, int]) -> None:
    """Put `KeptFeatures` in place of the encoders of some media, in place; their weights are let go."""
    for medium in media:
        name = TOWER_NAMES[medium]
        encoder = getattr(model.model, name)
        device = next(encoder.parameters()).device
        setattr(model.model, name, KeptFeatures(encoder, pooled.get(medium, 1)).to(device))
        encoder.backbone.to("meta")


Loaded = tuple[Sample, int, list[LoadedMedia] | str]


@dataclass
class _Wanted(Dataset[Loaded]):
    """Loads versions of samples when they are read."""

    versions: Sequence[tuple[Sample, int]]
    load: Load
    seed: int | None

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, index: int) -> Loaded:
        sample, version = self.versions[index]
        seed = self.seed
        generator = None if seed is None else random_generator(seed, version, sample.id, "augmentation")
        try:
            return sample, version, self.load(sample, generator=generator)
        except ValueError as error:
            return sample, version, str(error) or type(error).__name__


@dataclass
class _Filler:
    """Encodes and writes the part of one process."""

    model: Any
    load: Load
    form: Form
    writer: ShardWriter

    def write(
        self, store: FeatureStore, wanted: Sequence[tuple[Sample, int]], progress: Callable[[int, int], None] | None
    ) -> None:
        """Load, encode and write, batch by batch."""
        for key in store.renewed:
            self.writer.add_sample(*key, store.entries[key])
        data = _Wanted(wanted, self.load, store.seed)
        batches = DataLoader(data, ITEMS_PER_BATCH, collate_fn=list, num_workers=self.form.num_workers)
        done = 0
        for batch in batches if wanted else ():
            self._add(batch)
            self.writer.flush_when_due()
            done += len(batch)
            if progress is not None:
                progress(done, len(wanted))
        self.writer.flush()

    def _add(self, batch: Sequence[Loaded]) -> None:
        rows: list[tuple[str, int, Any]] = []
        new: dict[str, tuple[KeptItem, LoadedMedia]] = {}
        for sample, version, loaded in batch:
            if isinstance(loaded, str):
                rows.append((sample.id, version, loaded))
                continue
            keys = [key_of(item, self.form.fingerprint[item.medium]) for item in loaded]
            items = kept_items(sample, loaded, keys)
            rows.append((sample.id, version, items))
            new |= {item.key: (item, media) for item, media in zip(items, loaded, strict=True)}
        new = {key: both for key, both in new.items() if key not in self.writer.known}
        for medium in {item.medium for item, _ in new.values()}:
            self._encode(medium, [both for both in new.values() if both[0].medium == medium])
        for row in rows:
            self.writer.add_sample(*row)

    @torch.no_grad()
    def _encode(self, medium: str, items: Sequence[tuple[KeptItem, LoadedMedia]]) -> None:
        """Encode items of one medium together."""
        inputs = stack_media([media for _, media in items])
        device = next(self.model.model.encoder(medium).parameters()).device
        values = next(value for name, value in inputs.items() if name.endswith("values")).to(device)
        lengths = inputs.get(SIZE_KEYS[medium])
        encoded = self.model.model.encode(medium, values, None if lengths is None else lengths.to(device))
        for (item, _), features, count in zip(items, encoded.values, encoded.lengths.tolist(), strict=True):
            self.writer.add_features(item, self.form.of(features[:count], medium))
