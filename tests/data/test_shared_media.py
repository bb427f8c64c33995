"""Samples that hold the same files are found, kept together where they fit, and given the very same media."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm.data.av_pairs import clip_pairs
from mllm.data.batching import Lengths, SampleKey, TokenBucketBatchSampler
from mllm.data.dataset import Item, ManifestDataset
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.data.shared_media import merge_media, parts_that_fit, samples_that_share
from mllm.data.skipped import SkippedSample


def sample(name: str, *files: str, root: str = "") -> Sample:
    """Return a question about files; what ends in .wav is audio, the rest is video."""
    media = tuple(Media("audio" if file.endswith("wav") else "video", file) for file in files)
    messages = (Message("user", (*media, Text("what?"))), Message("assistant", (Text("x"),)))
    return Sample(name, messages, task="t", root=Path(root))


CLIPS = [
    sample("asr0", "0.wav"),
    sample("text"),
    sample("vsr1", "1.mp4"),
    sample("avsr0", "0.wav", "0.mp4"),
    sample("vsr0", "0.mp4"),
    sample("other root", "0.wav", root="elsewhere"),
    sample("asr1", "1.wav"),
]


def test_groups_are_chains_of_shared_files() -> None:
    assert samples_that_share(CLIPS) == [[0, 3, 4], [1], [2], [5], [6]]
    assert samples_that_share([sample("a", "1.wav"), sample("b", "2.wav"), sample("c", "2.wav", "1.wav")]) == [
        [0, 1, 2]
    ]


def test_groups_are_cut_to_what_a_batch_holds() -> None:
    assert parts_that_fit([[0, 1, 2], [3]], [5, 5, 9, 20], max_tokens=20, max_rows=None) == [[0, 1], [2], [3]]
    assert parts_that_fit([[0, 1, 2]], [1, 1, 1], max_tokens=20, max_rows=2) == [[0, 1], [2]]
    assert parts_that_fit([[0, 1, 2]], [4, 5, 6], max_tokens=18, max_rows=3) == [[0, 1, 2]]


def test_a_whole_group_holds_every_file_once_and_its_clips_stay_clips() -> None:
    (one,) = merge_media([CLIPS[0], CLIPS[3], CLIPS[4]], "asr0")
    assert (one.id, one.media) == ("asr0", (Media("audio", "0.wav"), Media("video", "0.mp4")))
    assert clip_pairs(one) == [(0, 1)]
    (apart,) = merge_media([sample("a", "x/1.wav"), sample("b", "y/1.mp4")], "a")
    assert clip_pairs(apart) == []


def test_images_are_shared_by_samples_with_the_very_same_media() -> None:
    """A cap on all media of a request may cut an image into fewer tiles beside another one."""
    one, two = Media("image", "1.png"), Media("image", "2.png")
    samples = [
        Sample(name, (Message("user", (*media, Text("what?"))),), task="t")
        for name, media in (("a", [one]), ("b", [one, two]), ("c", [one]))
    ]
    assert samples_that_share(samples) == [[0, 1, 2]]
    load = Loader()
    items = ManifestDataset(samples, load=load, groups=samples_that_share(samples)).__getitems__([0, 1, 2])
    result = [item.media for item in items if isinstance(item, Item)]
    assert load.seen == ["1.png", "1.png", "2.png"]
    assert result[0][0] is result[2][0]
    assert result[0][0] is not result[1][0]


@pytest.mark.parametrize("case", range(60))
def test_groups_stay_together_and_every_sample_comes_once(case: int) -> None:
    rng = np.random.default_rng(case)
    count, num_processes = int(rng.integers(1, 150)), int(rng.integers(1, 7))
    lengths = np.clip(rng.lognormal(3, 1, count), 1, 300).astype(int)
    limits: dict[str, Any] = {
        "max_tokens": int(lengths.max() * rng.uniform(1, 6)),
        "max_rows": [None, 1, 3, 7][case % 4],
    }
    numbers = rng.integers(0, max(count // 3, 1), count)
    groups = parts_that_fit(
        [np.flatnonzero(numbers == number).tolist() for number in set(numbers.tolist())], lengths.tolist(), **limits
    )
    samples = Lengths(lengths, np.minimum(lengths, 20), rng.integers(0, 1 + case % 2, count), groups)
    one: list[list[int]] = []
    flat: list[list[int]] = []
    for index in range(num_processes):
        sampler = TokenBucketBatchSampler(samples, seed=1, process_index=index, num_processes=num_processes, **limits)
        batches = [[key.index for key in batch] for batch in sampler]
        flat += batches
        one += batches[: len(batches) - sampler.num_repeated]
    assert sorted(itertools.chain(*one)) == list(range(count))
    assert all(len(batch) <= (limits["max_rows"] or count) for batch in flat)
    assert all(len(batch) * lengths[batch].max() <= limits["max_tokens"] for batch in flat)
    position = {index: number for number, batch in enumerate(one) for index in batch}
    parted = [group for group in groups if len({position[index] for index in group}) > 1]
    num_kinds = len({(len(group), tuple(sorted(np.asarray(samples.kinds)[group]))) for group in groups})
    assert len(parted) <= num_kinds * (num_processes - 1)
    if one != flat:
        assert all(batch in ([index] for index in range(count)) or batch in groups for batch in flat)


class Loader:
    """Loads a number per file and counts how often; refuses names that begin with "bad"."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, one: Sample, *, generator: np.random.Generator | None) -> list[Any]:
        loaded = []
        for part in one.media:
            self.seen.append(part.path)
            if part.path.startswith("bad"):
                raise ValueError(f"{part.path} cannot be read")
            loaded.append([part.path, None if generator is None else generator.random()])
        return loaded


def test_a_batch_reads_a_shared_file_once_and_with_one_generator() -> None:
    load = Loader()
    data = ManifestDataset(CLIPS, load=load, seed=5, groups=samples_that_share(CLIPS))
    items = data.__getitems__([SampleKey(2, index) for index in (0, 3, 4, 2)])
    result = {item.sample.id: item.media for item in items if isinstance(item, Item)}
    assert load.seen == ["0.wav", "0.mp4", "1.mp4"]
    assert result["asr0"][0] is result["avsr0"][0]
    assert result["vsr0"][0] is result["avsr0"][1]
    again = ManifestDataset(CLIPS, load=Loader(), seed=5, groups=samples_that_share(CLIPS)).__getitems__(
        [SampleKey(2, 0)]
    )
    assert [item.media for item in again if isinstance(item, Item)] == [result["asr0"]]
    alone = ManifestDataset(CLIPS, load=Loader(), seed=5)[SampleKey(2, 3)]
    assert isinstance(alone, Item)
    assert alone.media != result["avsr0"], "without groups augmentation is the sample's own"


def test_a_bad_file_takes_only_the_samples_that_hold_it() -> None:
    samples = [sample("asr", "ok.wav"), sample("avsr", "ok.wav", "bad.mp4"), sample("vsr", "bad.mp4")]
    items = ManifestDataset(samples, load=Loader(), groups=samples_that_share(samples)).__getitems__([0, 1, 2])
    assert [isinstance(item, SkippedSample) for item in items] == [False, True, True]
