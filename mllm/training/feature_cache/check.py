"""Looks kept features over: what a folder holds, whether every byte is what was written, and what a run would miss.

Knows stores, and a run's settings. Encodes nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.config.run import RunConfig
from mllm.training.feature_cache.building import VALIDATION, with_captions
from mllm.training.feature_cache.features import form_of
from mllm.training.feature_cache.store import (
    FeatureStore,
    digest_of_file,
    fingerprint_differences,
    missing_keys,
    read_fingerprint,
)
from mllm.training.pipeline.loaders import read_samples


@dataclass
class Checked:
    """What was found in a folder of features: lines about it, and lines about what is wrong."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_features(folder: Path, settings: RunConfig | None = None) -> Checked:
    """Look over a folder: what it holds, every byte of it, and, with settings, what a run would miss.

    Raises:
        ValueError: it holds no features.
    """
    if not read_fingerprint(folder):
        raise ValueError(f"{folder} holds no features (there is no fingerprint.json)")
    found = Checked()
    _check_store(found, folder, settings, augmented=True)
    if (folder / VALIDATION).is_dir() or (settings is not None and settings.data.validation):
        found.facts.append(f"in {VALIDATION}, for data.validation:")
        _check_store(found, folder / VALIDATION, settings, augmented=False)
    return found


def _check_store(found: Checked, folder: Path, settings: RunConfig | None, *, augmented: bool) -> None:
    """Look over one folder, and compare it with a run if there is one."""
    fingerprint = read_fingerprint(folder)
    store = FeatureStore(folder)
    store.read_index()
    items = {own.key: own for kept in store.entries.values() if not isinstance(kept, str) for own in kept}
    for medium, own in fingerprint.items():
        mine = [item for item in items.values() if item.medium == medium]
        shards = [shard for shard in store.shards.values() if shard.name.startswith(f"{medium}-")]
        rate = own.get("pooled_frames", 1)
        found.facts.append(
            f"{medium}: {len(mine):,} items, {sum(item.num_rows for item in mine):,} rows "
            f"({'every frame' if rate == 1 else f'means of {rate} frames'}, {own.get('dtype')}), {len(shards)} shards, "
            f"{sum(shard.num_bytes for shard in shards):,} bytes; encoder {str(own.get('encoder'))[:12]}"
        )
    found.facts.append(f"{len({place[0] for place in store.entries}):,} samples, {len(store.entries):,} with versions")
    for shard in store.shards.values():
        file = folder / shard.name
        if not file.exists():
            found.problems.append(f"{shard.name} is gone")
        elif file.stat().st_size != shard.num_bytes or digest_of_file(file) != shard.digest:
            found.problems.append(f"{shard.name} is not what was written (its digest differs)")
    found.problems += [f"{place[0]} version {place[1]}: {why}" for place, _, why in missing_keys(store)]
    if settings is not None:
        _check_for_run(found, store, fingerprint, settings, augmented=augmented)


def _check_for_run(
    found: Checked, store: FeatureStore, fingerprint: dict[str, Any], settings: RunConfig, *, augmented: bool
) -> None:
    """Whether a run could read what is there, and what it would have to make."""
    from mllm.checkpoints.build import build_processor, elastic_config

    processor = build_processor(settings.model, limits=settings.data.limits)
    form = form_of(elastic_config(settings.model, processor), processor, settings, augmented=augmented)
    differences = fingerprint_differences(fingerprint, form.fingerprint)
    found.problems += [f"not of this config: {words}" for words in differences]
    found.problems += [f"not of this config: no {medium}" for medium in form.fingerprint if medium not in fingerprint]
    data = settings.data
    if augmented:
        samples = with_captions(read_samples(data.train, data), read_samples(data.captions, data))
    else:
        samples = read_samples(data.validation, data)
    assert settings.data.features is not None
    store.versions = settings.data.features.versions if augmented else 1
    for sample, version in store.missing(samples):
        entry = store.entries.get((sample.id, version))
        why = "missing" if entry is None else entry if isinstance(entry, str) else "its files have changed"
        found.problems.append(f"{sample.id} version {version}: {why}")
    wanted = len(samples) * store.versions
    found.facts.append(f"{wanted:,} samples and versions in the manifests")
