"""Begins a run on a stream of shards: looks at its first samples, and makes the loader of a process.

Knows the `data` block of a run config and what counts tokens. Does not know tars, or in which order they are read.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader

from mllm.config.run import DataConfig, RunConfig
from mllm.data.dataset import Collator, Load
from mllm.data.findings import ManyLines, first_lines
from mllm.data.hub import HubListing, hub_name, list_shards
from mllm.data.hub_cache import HubCache
from mllm.data.manifest import Sample
from mllm.data.shard_stream import Shards
from mllm.data.skipped import SkipLog, SkippedSample, too_many_bad
from mllm.processing.processor import ElasticProcessor
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.loaders import SKIPPED_FILE
from mllm.training.pipeline.stream_batches import PoolNotes, StreamBatches, StreamDataset
from mllm.training.pipeline.token_scan import (
    SampleTokens,
    SoftTokens,
    check_targets,
    measure_samples,
    target_report,
)
from mllm.training.pipeline.worker_process import worker_options
from mllm.utils.distributed import gather_json

POOLS = "stream"
"""Folder of a run that says where its stream was; see `PoolNotes`."""
FETCHED = "shards-"
"""Begins the name, which ends with the rank, of a folder in it of shards of a hub that a process keeps for itself."""
logger = logging.getLogger(__name__)


def find_shards(config: RunConfig, commits: Mapping[str, str] | None = None) -> Shards:
    """Find the shards of `data.train`. Those of a hub are listed by the main process for all, since a revision may move
    from one moment to the next; every process calls this.

    Args:
        commits: those that a run began with, by name, which goes on with them.

    Raises:
        ValueError, OSError: see `Shards.of` and `list_shards`; or a limit of what is fetched where nothing is.
    """
    data, state = config.data, PartialState()
    assert data.stream is not None
    answer: dict[str, Any] = {}
    if state.is_main_process:
        try:
            answer = {"listings": {name: one.plain() for name, one in _listed(data, commits or {}).items()}}
        except (ValueError, OSError) as error:
            if state.num_processes == 1:
                raise
            answer = {"error": str(error)}
    answer = gather_json(answer)[0]
    if "error" in answer:  # the others would wait for a process that is gone
        raise ValueError(answer["error"])
    listings = {name: HubListing.of_plain(one) for name, one in answer["listings"].items()}
    cache = _cache(config, data.stream.max_disk_gb, is_needed=bool(listings))
    return Shards.of(data.train, data.root, data.reader, listings=listings, hub_cache=cache)


def _cache(config: RunConfig, max_disk_gb: float | None, *, is_needed: bool) -> HubCache | None:
    """Make the cache of this process where it has one of its own; what a killed run left of others is deleted."""
    folder, state = Path(config.train.out).expanduser() / POOLS, PartialState()
    for left in folder.glob(f"{FETCHED}*"):
        if int(left.name.removeprefix(FETCHED)) % state.num_processes == state.process_index:
            shutil.rmtree(left)
    if max_disk_gb is None:
        return None
    if not is_needed:
        raise ValueError("data.stream.max_disk_gb limits what is fetched of a hub, and data.train names none of it")
    return HubCache(folder / f"{FETCHED}{state.process_index}", int(max_disk_gb * 1e9))


def _listed(data: DataConfig, commits: Mapping[str, str]) -> dict[str, HubListing]:
    """List what `data.train` names of a hub, by name."""
    listings = {}
    for name in data.train:
        if hub_name(name, data.reader) is None:
            continue
        listing = listings[name] = list_shards(name, data.reader, commits.get(name))
        logger.info(
            "%s: %d shards, %.3g GB, of commit %s",
            *(name, len(listing.files), sum(size for _, size in listing.files) / 1e9, listing.commit),
        )
    return listings


def first_samples(shards: Shards, processor: ElasticProcessor, config: DataConfig, seed: int) -> list[Sample]:
    """Read the first samples of a stream, and check them as a scan checks all.

    Returns:
        Those that can be used.

    Raises:
        ManyLines: too many cannot be used, or none can; the first are named, each with its shard and its name in it.
        ValueError: too many of them have nothing to learn.
    """
    assert config.stream is not None
    with closing(shards.samples(seed, num_epochs=1)) as stream:
        seen = list(islice(stream, config.stream.shuffle_samples))
        samples = [one.sample for one in seen if isinstance(one.sample, Sample)]
        measured = _measured(samples, processor, config)
    if not seen:
        some = shards.shards
        raise ValueError(f"data.train: there is no sample in {len(some)} shards, such as {some[0].name}")
    bad = [one.sample.reason for one in seen if isinstance(one.sample, SkippedSample)]
    pairs = list(zip(samples, measured, strict=True))
    bad += [f"sample {sample.id!r}: {one}" for sample, one in pairs if isinstance(one, ValueError)]
    if too_many_bad(len(bad), len(seen), config.max_bad_fraction):
        summary = (
            f"data.train: {len(bad)} of the first {len(seen)} samples cannot be used; data.max_bad_fraction allows "
            f"{config.max_bad_fraction:g}"
        )
        raise ManyLines("\n".join([*first_lines(bad), summary]))
    good = [(sample, one) for sample, one in pairs if isinstance(one, SampleTokens)]
    ids, targets = [sample.id for sample, _ in good], [one.num_targets for _, one in good]
    logger.info("the first samples of %d shards: %s", len(shards.shards), target_report(ids, targets))
    check_targets(ids, targets, config.max_unsupervised_fraction)
    return [sample for sample, _ in good]


def stream_batches(
    shards: Shards, processor: ElasticProcessor, *, config: RunConfig, run: Path, slots: RankSlots, start_step: int = 0
) -> StreamBatches:
    """Choose the micro-batches of a process as a run config says.

    Args:
        start_step: the step that a resumed run begins with, which passes over the batches before it.
    """
    return StreamBatches(
        shards,
        partial(count_tokens, processor=processor, config=config.data),
        config=config.data,
        seed=config.train.seed,
        slots=slots,
        notes=PoolNotes(run / POOLS),
        start_step=start_step,
        num_repeated=config.train.overfit_batches,
    )


def stream_loader(
    batches: StreamBatches, *, load: Load, encode: Callable[..., dict[str, Any]], config: DataConfig, run: Path
) -> DataLoader[Any]:
    """Make the loader of a process's micro-batches, which goes on for ever; see `train_loader`.

    Args:
        load: loads the media of a sample, augmented by seed, epoch and sample id.
    """
    skipped = run / SKIPPED_FILE.format(rank=batches.slots.rank)
    return DataLoader(
        StreamDataset(load, seed=batches.seed),
        batch_sampler=batches,  # pyright: ignore[reportArgumentType] (a batch of keys may be of any type)
        collate_fn=Collator(encode, skip_log=SkipLog(skipped, max_bad_fraction=config.max_bad_fraction)),
        **worker_options(config.num_workers),
    )


def count_tokens(
    samples: Sequence[Sample], *, processor: ElasticProcessor, config: DataConfig
) -> list[int | ValueError]:
    """Count the tokens of each sample at the largest budgets, or say why it cannot be used."""
    soft_tokens = SoftTokens(processor.space.largest(), processor.space)
    return [
        one if isinstance(one, ValueError) else one.tokens_with(soft_tokens)
        for one in _measured(samples, processor, config)
    ]


def _measured(
    samples: Sequence[Sample], processor: ElasticProcessor, config: DataConfig
) -> list[SampleTokens | ValueError]:
    """Measure each sample, or say why no batch of the run can hold it."""
    answer_tokens = config.host_answer_tokens
    try:
        measured = measure_samples(samples, processor, config.max_sample_tokens, answer_tokens or 0)
    except ValueError as error:  # one spoils the others; which one shows when each is measured alone
        if len(samples) == 1:
            return [error]
        return [one for sample in samples for one in _measured([sample], processor, config)]
    soft_tokens = SoftTokens(processor.space.largest(), processor.space)
    result: list[SampleTokens | ValueError] = []
    for sample, one in zip(samples, measured, strict=True):
        if one.refused is not None:
            result.append(ValueError(one.refused))
        elif sample.messages[-1].role != "assistant" and answer_tokens is None:
            result.append(ValueError("it has no answer to learn from: its last message is the user's"))
        elif (tokens := one.tokens_with(soft_tokens)) > config.tokens_per_batch:
            result.append(
                ValueError(
                    f"it has {tokens} tokens at the largest budget, and data.tokens_per_batch is "
                    f"{config.tokens_per_batch}; raise it, or cut samples with data.max_sample_tokens"
                )
            )
        else:
            result.append(one)
    return result
