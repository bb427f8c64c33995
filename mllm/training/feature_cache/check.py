"""Checks kept features: what a folder holds, whether every byte is what was written, and what a run would miss.

Knows stores, and a run's config. Encodes nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.config.run import RunConfig
from mllm.training.feature_cache.building import VALIDATION, FeatureSamples, with_captions
from mllm.training.feature_cache.features import form_of
from mllm.training.feature_cache.store import (
    FeatureStore,
    fingerprint_differences,
    missing_keys,
    read_fingerprint,
)
from mllm.training.pipeline.loaders import read_samples
from mllm.utils.files import digest_of_file


@dataclass
class Checked:
    """Holds what a check of a folder gave: lines about it, and lines about what is wrong."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_features(folder: Path, config: RunConfig | None = None) -> Checked:
    """Check a folder: what it holds, every byte of it, and, with a config, what a run would miss.

    Raises:
        ValueError: it holds no features.
    """
    if not read_fingerprint(folder):
        raise ValueError(f"{folder} holds no features (there is no fingerprint.json)")
    checked = Checked()
    _check_store(checked, folder, config, augmented=True)
    if (folder / VALIDATION).is_dir() or (config is not None and config.data.validation):
        checked.facts.append(f"in {VALIDATION}, for data.validation:")
        _check_store(checked, folder / VALIDATION, config, augmented=False)
    return checked


def _check_store(checked: Checked, folder: Path, config: RunConfig | None, *, augmented: bool) -> None:
    """Check one folder, and compare it with a run if there is one."""
    fingerprint = read_fingerprint(folder)
    store = FeatureStore(folder)
    store.read_index()
    entries = [entry for entry in store.entries.values() if not isinstance(entry, str)]
    items = {item.key: item for entry in entries for item in entry}
    for medium, facts in fingerprint.items():
        of_medium = [item for item in items.values() if item.medium == medium]
        shards = [shard for shard in store.shards.values() if shard.name.startswith(f"{medium}-")]
        rate = facts.get("pooled_frames", 1)
        checked.facts.append(
            f"{medium}: {len(of_medium):,} items, {sum(item.num_rows for item in of_medium):,} rows "
            f"({'every frame' if rate == 1 else f'means of {rate} frames'}, {facts.get('dtype')}), "
            f"{len(shards)} shards, "
            f"{sum(shard.num_bytes for shard in shards):,} bytes; encoder {str(facts.get('encoder'))[:12]}"
        )
    checked.facts.append(
        f"{len({sample_id for sample_id, _ in store.entries}):,} samples, {len(store.entries):,} with versions"
    )
    for shard in store.shards.values():
        file = folder / shard.name
        if not file.exists():
            checked.problems.append(f"{shard.name} is gone")
        elif file.stat().st_size != shard.num_bytes or digest_of_file(file) != shard.digest:
            checked.problems.append(f"{shard.name} is not what was written (its digest differs)")
    checked.problems += [
        f"{sample_id} version {version}: {why}" for (sample_id, version), _, why in missing_keys(store)
    ]
    if config is not None:
        _check_for_run(checked, store, fingerprint, config, augmented=augmented)


def _check_for_run(
    checked: Checked, store: FeatureStore, fingerprint: dict[str, Any], config: RunConfig, *, augmented: bool
) -> None:
    """Check whether a run could read what is there, and list what it would have to make."""
    from mllm.checkpoints.build import build_config, processor_of

    tokenizer, elastic = build_config(config.model)
    processor = processor_of(config.model, tokenizer, elastic, limits=config.data.limits)
    form = form_of(elastic, processor, config, augmented=augmented)
    differences = fingerprint_differences(fingerprint, form.fingerprint)
    checked.problems += [f"not of this config: {words}" for words in differences]
    checked.problems += [f"not of this config: no {medium}" for medium in form.fingerprint if medium not in fingerprint]
    data = config.data
    if augmented:
        samples = with_captions(read_samples(data.train, data), read_samples(data.captions, data))
    else:
        samples = read_samples(data.validation, data)
    samples = FeatureSamples(samples).only(config.kept_media).train
    assert config.data.features is not None
    store.versions = config.data.features.versions if augmented else 1
    for sample, version in store.missing(samples):
        entry = store.entries.get((sample.id, version))
        why = "missing" if entry is None else entry if isinstance(entry, str) else "its files have changed"
        checked.problems.append(f"{sample.id} version {version}: {why}")
    wanted = len(samples) * store.versions
    checked.facts.append(f"{wanted:,} samples and versions in the manifests")
