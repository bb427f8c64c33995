"""Turns samples into loaded media, and loaded samples into a batch; what is bad is skipped on the way.

Knows samples and random generators. Does not know formats, encoders, tokenizers or budgets: how media are loaded and
how a batch is encoded are callables of others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

from mllm.data.batching import SampleKey
from mllm.data.manifest import Sample
from mllm.data.shared_media import merge_media, split_media
from mllm.data.skipped import SkipLog, SkippedSample
from mllm.utils.activity import note_activity
from mllm.utils.fail_points import fail_point
from mllm.utils.random_generator import random_generator

MAX_SUBSTITUTES = 8
"""How many samples are tried in place of a batch in which every sample is bad."""

Encoded = TypeVar("Encoded")


class Load(Protocol):
    """Loads and transforms the media of a sample, in order of appearance; augments when there is a generator."""

    def __call__(self, sample: Sample, *, generator: np.random.Generator | None) -> Any: ...


@dataclass(frozen=True, slots=True)
class Item:
    """Holds a sample with what `Load` made of its media."""

    sample: Sample
    media: Any
    epoch: int = 0


class ManifestDataset(Dataset[Item | SkippedSample]):
    """Gives the samples of a manifest, loaded when asked for by index or by `SampleKey`.

    A sample whose media cannot be used (any `MediaError`, any other `ValueError` of loading) comes as `SkippedSample`.
    When that befalls every sample of a batch, the next good one of the manifest is added, so that no batch is empty;
    which one depends on the batch only.

    Args:
        samples: what `read_manifest` gives.
        load: see `Load`; picklable when workers are spawned.
        seed: of augmentation, which is a function of seed, epoch and sample id; None never augments.
        groups: every sample in one, with those that hold the same files (see `mllm.data.shared_media`). The samples of
            a group that come in one batch get the very same media, each loaded once, augmented as the group's first
            sample is. Where something of it cannot be loaded, each is loaded by itself.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        load: Load,
        seed: int | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not samples:
            raise ValueError("a data set needs at least one sample")
        self.samples = samples
        self.load = load
        self.seed = seed
        self._first = None if groups is None else {index: group[0] for group in groups for index in group}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey | int) -> Item | SkippedSample:
        return self._group([_sample_key(key)])[0]

    def load_in(self, samples: Sequence[Sample], epoch: int, name: str) -> list[Any]:
        """Load the media of each of some samples as they are in an epoch; what two of them hold is loaded once.

        Args:
            name: the sample id that augmentation depends on.
        """
        if len(samples) == 1:
            return [self.load(samples[0], generator=self._generator(epoch, name))]
        loaded = {
            whole.media: self.load(whole, generator=self._generator(epoch, name))
            for whole in merge_media(samples, name)
        }
        return split_media(loaded, samples)

    def _generator(self, epoch: int, name: str) -> np.random.Generator | None:
        return None if self.seed is None else random_generator(self.seed, epoch, name, "augmentation")

    def _group(self, keys: Sequence[SampleKey]) -> list[Item | SkippedSample]:
        """Load the items of one group and epoch."""
        epoch, first = keys[0]
        samples = [self.samples[key.index] for key in keys]
        note_activity("loading media", [sample.id for sample in samples])
        fail_point("decode")
        name = self.samples[first if self._first is None else self._first[first]].id
        try:
            loaded = self.load_in(samples, epoch, name)
        except ValueError as error:
            if len(keys) > 1:  # one of them may be good without what the others hold
                return [item for key in keys for item in self._group([key])]
            return [SkippedSample.of(samples[0].id, epoch, error)]
        return [Item(sample, media, epoch) for sample, media in zip(samples, loaded, strict=True)]

    def _parts(self, keys: Sequence[SampleKey]) -> list[list[SampleKey]]:
        """Put neighbours of one group and epoch together."""
        if (first := self._first) is None:
            return [[key] for key in keys]
        return [list(part) for _, part in groupby(keys, key=lambda key: (key.epoch, first[key.index]))]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Item | SkippedSample]:
        """Load a batch at once; a data loader calls this where it is defined."""
        sample_keys = [_sample_key(key) for key in keys]
        items = [item for part in self._parts(sample_keys) for item in self._group(part)]
        # Chosen by the batch alone, so that a resumed run substitutes what the uninterrupted one does.
        epoch, index = sample_keys[-1]
        for step in range(1, MAX_SUBSTITUTES + 1):
            if not all(isinstance(item, SkippedSample) for item in items):
                break
            items.append(self[SampleKey(epoch, (index + step) % len(self.samples))])
        return items


def _sample_key(key: SampleKey | int) -> SampleKey:
    """Return the key; a bare index is one of the first epoch."""
    return SampleKey(*key) if isinstance(key, tuple) else SampleKey(0, key)


class Collator(Generic[Encoded]):
    """Makes a batch of the good samples and notes the bad ones in the skip log.

    Args:
        encode: samples and their media, in step, to a batch. A sample that it refuses with a `ValueError` also when it
            stands alone is bad as well.
        skip_log: None forgives nothing: the first bad sample raises.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Sample], Sequence[Any]], Encoded],
        *,
        skip_log: SkipLog | None = None,
    ) -> None:
        self.encode = encode
        self.skip_log = skip_log

    def __call__(self, items: Sequence[Item | SkippedSample]) -> Encoded:
        """Encode what is good.

        Raises:
            TooManyBadSamples: see `SkipLog`.
            ValueError: nothing is good, or something is bad and there is no skip log.
        """
        good = [item for item in items if isinstance(item, Item)]
        bad = [item for item in items if isinstance(item, SkippedSample)]
        if bad and self.skip_log is None:
            raise ValueError(f"sample {bad[0].sample_id!r} cannot be used: {bad[0].reason}")
        try:
            batch = self._encode(good) if good else None
        except ValueError:
            # One sample that the model cannot take spoils the whole batch; which one shows when each is tried alone.
            refused = [] if self.skip_log is None else self._refused(good)
            if not refused:
                raise
            bad += refused
            ids = {one.sample_id for one in refused}
            good = [item for item in good if item.sample.id not in ids]
            batch = self._encode(good) if good else None
        if self.skip_log is not None:
            self.skip_log.note(len(items), bad)
        if batch is None:
            raise ValueError(f"no sample of the batch can be used; the last: {bad[-1].sample_id!r}, {bad[-1].reason}")
        return batch

    def _encode(self, items: Sequence[Item]) -> Encoded:
        fail_point("collate")
        return self.encode([item.sample for item in items], [item.media for item in items])

    def _refused(self, items: Sequence[Item]) -> list[SkippedSample]:
        """Return the items that cannot be encoded alone either; the others suffered from their neighbours."""
        refused = []
        for item in items:
            try:
                self._encode([item])
            except ValueError as error:
                refused.append(SkippedSample.of(item.sample.id, item.epoch, error))
        return refused
