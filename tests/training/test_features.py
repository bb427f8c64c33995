"""Features that are kept: what is learned from them is what is learned from the files, and nothing stale is read."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file

from mllm.checkpoints.build import build
from mllm.checkpoints.load import TRAINABLES, load
from mllm.cli import main
from mllm.config.medium import PoolConfig
from mllm.config.model import EncoderAdapterConfig
from mllm.config.run import DataConfig, FeatureConfig, RunConfig, SamplerConfig, TrainConfig, config_yaml
from mllm.data.dataset import Item
from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.encoders import encoder_facts
from mllm.training.feature_cache import building, features
from mllm.training.feature_cache.building import make_features
from mllm.training.feature_cache.check import check_features
from mllm.training.feature_cache.features import (
    Form,
    KeptFeatures,
    fill_store,
    form_of,
    part_of_rank,
    pass_features_through,
)
from mllm.training.feature_cache.store import FeatureStore, ShardWriter, claim, key_of
from mllm.training.pipeline.loaders import loading
from mllm.training.run import train

KINDS = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video"), "see": ("image",)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a tiny model, and clips and images in tasks that share files; one audio is broken."""
    folder = tmp_path_factory.mktemp("features")
    tiny.write_parts(folder / "parts")
    samples = []
    for seed in range(3):
        files = tiny.write_media(folder / "media", seed=seed, seconds=0.4 + 0.08 * seed)
        for task, kinds in KINDS.items():
            parts = (*(Media(kind, f"media/{files[kind]}") for kind in kinds), Text("what?"))  # type: ignore[arg-type]
            messages = (Message("user", parts), Message("assistant", (Text(f"answer {seed}"),)))
            samples.append(Sample(f"{task}{seed}", messages, task=task))
    (folder / "media" / "broken.wav").write_bytes(b"RIFF but not much of it")
    broken = (Message("user", (Media("audio", "media/broken.wav"),)), Message("assistant", (Text("nothing"),)))
    samples.append(Sample("broken", broken, task="asr"))
    write_manifest(folder / "train.jsonl", samples)
    tone = torch.sin(torch.arange(16_000) / 5).numpy() * 0.1
    soundfile.write(folder / "noise.wav", tone, 16_000)
    return folder


def settings_of(world: Path, output: Path, *, features: FeatureConfig | None = None, **data) -> RunConfig:
    model = tiny.settings_on({name: str(world / "parts" / name) for name in ("llm", "image", "audio", "video")})
    data_values = {"tokens_per_batch": 512, "max_rows": 4, "num_workers": 0, "max_bad_fraction": 0.2, **data}
    noisy = {"noise": str(world / "noise.wav"), "snr_db": [None, 0.0], **data_values}
    return RunConfig(
        model=model,
        data=DataConfig(train=[str(world / "train.jsonl")], features=features, **noisy),
        sampler=SamplerConfig(mode="all"),
        train=TrainConfig(out=str(output), epochs=2, learning_rate=1e-3, progress=False, use_cpu=True, seed=3),
    )


@pytest.fixture(scope="module")
def files_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the files themselves."""
    return train(settings_of(world, tmp_path_factory.mktemp("run") / "files"))


@pytest.mark.parametrize("made_before", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_with_a_version_per_epoch_nothing_but_the_speed_changes(
    world: Path, files_run: Path, tmp_path: Path, made_before: bool
) -> None:
    config = settings_of(
        world, tmp_path / "features", features=FeatureConfig(folder=str(tmp_path / "kept"), versions=2, seed=3)
    )
    if made_before:
        for rank in range(2):
            make_features(config, rank=rank, num_ranks=2)
    train(config)
    files, features = (load_file(folder / TRAINABLES) for folder in (files_run, tmp_path / "features"))
    assert files.keys() == features.keys()
    for name, value in files.items():
        torch.testing.assert_close(features[name], value, rtol=1e-3, atol=1e-5)
    bad = [json.loads(line) for line in (tmp_path / "features" / "skipped-0.jsonl").read_text().splitlines()]
    assert {row["id"] if "id" in row else row["sample_id"] for row in bad} == {"broken"}
    load(tmp_path / "features")


def test_images_are_kept_while_audio_is_augmented_anew_in_every_epoch(
    world: Path, files_run: Path, tmp_path: Path
) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"), media=["image"])
    train(settings_of(world, tmp_path / "run", features=kept))
    files, mixed = (load_file(folder / TRAINABLES) for folder in (files_run, tmp_path / "run"))
    for name, value in files.items():
        torch.testing.assert_close(mixed[name], value, rtol=1e-3, atol=1e-5)
    assert {path.name.split("-")[0] for path in (tmp_path / "kept").glob("*.safetensors")} == {"image"}
    store = FeatureStore(tmp_path / "kept")
    store.read_index()
    assert {sample_id for sample_id, _ in store.entries} == {"see0", "see1", "see2"}
    findings = check_features(tmp_path / "kept", settings_of(world, tmp_path / "run", features=kept))
    assert not findings.problems


def test_items_of_files_and_of_a_store_stand_in_the_order_of_their_sample(world: Path, tmp_path: Path) -> None:
    names = [("audio", "media/1.wav"), ("image", "media/2.png"), ("audio", "media/0.wav"), ("image", "media/1.png")]
    content = tuple(Media(medium, path) for medium, path in names)  # type: ignore[arg-type]
    sample = Sample("mixed", (Message("user", content), Message("assistant", (Text("yes"),))), "vqa", root=world)
    kept = FeatureConfig(folder=str(tmp_path / "kept"), media=["image"])
    config = settings_of(world, tmp_path / "run", features=kept)
    model, processor = build(config.model)
    filled = building.filled_stores(
        config, model, processor, building.FeatureSamples([sample]), rank=0, num_ranks=1
    ).train
    load_clean = loading(config.data, processor, augmented=False)
    item = features.FeatureDataset([sample], filled, kept=["image"], load=load_clean)[0]
    assert isinstance(item, Item)
    assert [one.medium for one in item.media] == ["audio", "image", "audio", "image"]
    whole = load_clean(sample, generator=None)
    for number in (0, 2):
        assert item.media[number].values.equal(whole[number].values)
    encoded = model.model.encode("image", torch.stack([whole[number].values for number in (1, 3)])).values
    for number, expected in zip((1, 3), encoded, strict=True):
        torch.testing.assert_close(item.media[number].values, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_kept_alone_is_refused(world: Path, tmp_path: Path) -> None:
    for media, pooled, message in (
        (["audio"], [], "audio and video of one clip are brought to one length, so keep both or neither"),
        (["image"], ["audio"], "data.features.pooled names audio; allowed: image"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(world, tmp_path, features=FeatureConfig(folder="x", media=media, pooled=pooled))


def test_features_of_another_form_are_refused_before_anything_is_read(world: Path, tmp_path: Path) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"), media=["image"])
    make_features(settings_of(world, tmp_path / "run", features=kept))
    other = settings_of(world, tmp_path / "run", features=dataclasses.replace(kept, dtype="bfloat16"))
    nowhere = dataclasses.replace(other, data=dataclasses.replace(other.data, train=["nowhere.jsonl"]))
    for start in (train, make_features):
        with pytest.raises(ValueError, match=r"image\.dtype was 'float32' and is 'bfloat16'"):
            start(nowhere)


def test_projectors_are_fitted_to_captions_whose_features_are_kept(world: Path, tmp_path: Path) -> None:
    """The same start as from files, whether a caption is also a training sample or not, and both are encoded once."""
    seen = [sample for sample in read_manifest(world / "train.jsonl", world) if sample.id in ("asr0", "asr1")]
    messages = (Message("user", (Media("audio", "media/2.wav"),)), Message("assistant", (Text("two"),)))
    write_manifest(world / "captions.jsonl", [*seen, Sample("caption", messages, task="caption")])
    clean = {"captions": [str(world / "captions.jsonl")], "noise": None, "snr_db": []}
    results = {}
    for name, kept in (("files", None), ("features", FeatureConfig(folder=str(tmp_path / "kept")))):
        run = settings_of(world, tmp_path / name, features=kept, **clean)
        train(dataclasses.replace(run, train=dataclasses.replace(run.train, learning_rate=1e-9)))
        results[name] = load_file(tmp_path / name / TRAINABLES)
    for name, value in results["files"].items():
        torch.testing.assert_close(
            results["features"][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    store = FeatureStore(tmp_path / "kept")
    store.read_index()
    assert ("caption", 0) in store.entries
    assert len(store.entries) == len(read_manifest(world / "train.jsonl", world)) + 1


def test_captions_and_samples_of_one_id_must_be_the_same(world: Path, tmp_path: Path) -> None:
    messages = (Message("user", (Media("audio", "media/2.wav"),)), Message("assistant", (Text("two"),)))
    write_manifest(world / "other.jsonl", [Sample("asr0", messages, task="caption")])
    kept = FeatureConfig(folder=str(tmp_path / "kept"))
    with pytest.raises(ValueError, match=r"the id 'asr0' is one sample in data.train and another in data.captions"):
        train(settings_of(world, tmp_path / "run", features=kept, captions=[str(world / "other.jsonl")]))


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_shares_media_between_tasks_of_a_clip(world: Path, tmp_path: Path, kept: bool) -> None:
    feature_config = FeatureConfig(folder=str(tmp_path / "kept")) if kept else None
    train(settings_of(world, tmp_path / "run", features=feature_config, share_media=True, max_rows=8))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    bad = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    assert {row["id"] for row in bad} == {"broken"}


def filled(world: Path, folder: Path, *, versions: int = 2, ranks: int = 1) -> tuple[FeatureStore, list[Sample]]:
    config = settings_of(world, folder, features=FeatureConfig(folder=str(folder), versions=versions, seed=3))
    model, processor = build(config.model)
    samples = read_manifest(world / "train.jsonl", world)
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        store = FeatureStore(folder, versions, 3)
        load = loading(config.data, processor, augmented=True)
        form = form_of(model.config, processor, config)
        fill_store(store, model.eval(), samples, load, form=form, rank=rank, num_ranks=ranks)
    store = FeatureStore(folder, versions, 3)
    store.read_index()
    return store, samples


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, list[Sample]]:
    """Two versions of all features, made by one process; nobody writes there."""
    return filled(world, tmp_path_factory.mktemp("whole"))


def test_equal_inputs_are_kept_once_and_versions_repeat(whole: tuple[FeatureStore, list[Sample]]) -> None:
    store, samples = whole
    by_id = {sample.id: sample for sample in samples}
    (first,) = store.load(by_id["vsr0"], 0)
    again = store.load(by_id["avsr0"], 0)[1]
    assert first.medium == again.medium == "video"
    audio = [store.load(by_id["asr1"], epoch)[0].values for epoch in range(4)]
    assert torch.equal(audio[0], audio[2])
    assert torch.equal(audio[1], audio[3])
    image = [store.entries["see2", version][0].key for version in (0, 1)]
    assert image[0] == image[1]
    items = {entry.key for entries in store.entries.values() if not isinstance(entries, str) for entry in entries}
    assert sum(shard.num_items for shard in store.shards.values()) == len(items)
    with pytest.raises(ValueError, match=r"broken.wav"):
        store.load(by_id["broken"], 0)


def test_two_processes_keep_what_one_keeps_and_a_kill_is_continued(
    world: Path, whole: tuple[FeatureStore, list[Sample]], tmp_path: Path
) -> None:
    one, samples = whole
    shutil.copytree(one.folder, tmp_path / "one")
    two, _ = filled(world, tmp_path / "two", ranks=2)
    assert {shard.name for shard in two.shards.values()} == {path.name for path in (tmp_path / "two").glob("*.safete*")}
    assert sum(shard.num_items for shard in two.shards.values()) == sum(s.num_items for s in one.shards.values())
    parts = [part_of_rank(samples, rank, 2) for rank in range(2)]
    assert sorted(sample.id for share in parts for sample in share) == sorted(sample.id for sample in samples)
    index = tmp_path / "one" / "index-0.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:7]) + lines[7][:20])  # a kill in the middle of a line, and of a shard
    (tmp_path / "one" / ".audio-0-00001.safetensors.writing").write_bytes(b"half a shard")
    continued, _ = filled(world, tmp_path / "one")
    assert not list((tmp_path / "one").glob(".*.writing"))
    for sample in samples:
        for version in range(2):
            if sample.id != "broken":
                for continued_item, expected in zip(
                    continued.load(sample, version), two.load(sample, version), strict=True
                ):
                    torch.testing.assert_close(continued_item.values, expected.values)
                    assert (continued_item.medium, continued_item.raw_length) == (expected.medium, expected.raw_length)


def test_a_kill_costs_no_more_than_the_shards_that_were_not_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm.training.feature_cache.store.SHARD_BYTES", 1)
    monkeypatch.setattr(features, "ITEMS_PER_BATCH", 4)
    written: list[int] = []
    add = ShardWriter.add_sample

    def killed(writer, *arguments) -> None:
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(1)
        add(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "add_sample", killed)
    with pytest.raises(KeyboardInterrupt):
        filled(world, tmp_path / "kept", versions=1)
    store = FeatureStore(tmp_path / "kept")
    store.read_index()
    samples = read_manifest(world / "train.jsonl", world)
    assert len(store.missing(samples)) == len(samples) - 8
    monkeypatch.setattr(ShardWriter, "add_sample", add)
    filled(world, tmp_path / "kept", versions=1)
    store.read_index()
    assert [sample.id for sample, _ in store.missing(samples)] == ["broken"]


def test_a_file_that_changed_is_encoded_again_and_one_that_only_looks_newer_is_not(world: Path, tmp_path: Path) -> None:
    store, samples = filled(world, tmp_path / "kept", versions=1)
    assert [sample.id for sample, _ in store.missing(samples)] == ["broken"]
    path = world / "media" / "1.png"
    before = path.read_bytes()
    path.write_bytes(before)
    assert [sample.id for sample, _ in store.missing(samples)] == ["broken"]
    assert store.renewed == [("see1", 0)]
    kept, _ = filled(world, tmp_path / "kept", versions=1)
    assert (kept.missing(samples), kept.renewed) == (store.missing(samples), [])  # the new time has been noted
    path.write_bytes((world / "media" / "2.png").read_bytes())
    try:
        assert [sample.id for sample, _ in store.missing(samples)] == ["see1", "broken"]
        path.unlink()
        assert [sample.id for sample, _ in store.missing(samples)] == ["see1", "broken"]
    finally:
        path.write_bytes(before)


def test_features_of_something_else_are_refused(world: Path, tmp_path: Path) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"))
    train(settings_of(world, tmp_path / "one", features=kept))
    with pytest.raises(
        ValueError, match=r"data.features.folder .*kept holds features of something else \(image.seed was 0"
    ):
        train(settings_of(world, tmp_path / "two", features=dataclasses.replace(kept, seed=1)))


def test_features_of_other_masks_are_something_else(world: Path, tmp_path: Path) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"))
    model, processor = build(settings_of(world, tmp_path).model)

    def fingerprint(**data) -> dict:
        return dict(form_of(model.config, processor, settings_of(world, tmp_path, features=kept, **data)).fingerprint)

    plain, masked = fingerprint(), fingerprint(audio_mask_samples=[1_600, 16_000])
    assert plain != masked
    assert plain["video"] == masked["video"]  # a mask of the audio leaves the features of videos as they are
    assert plain["video"] != fingerprint(flip_probability=0.5)["video"]
    claim(tmp_path / "kept", plain)
    with pytest.raises(ValueError, match=r"audio\.audio_mask_samples was \[\] and is \[1600, 16000\]"):
        claim(tmp_path / "kept", masked)


def test_what_learns_or_answers_needs_its_encoders(world: Path, tmp_path: Path) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"))
    config = settings_of(world, tmp_path / "run", features=kept)
    with pytest.raises(ValueError, match=r"frozen encoders give, but train.parts holds audio"):
        dataclasses.replace(config, train=dataclasses.replace(config.train, parts=["compressors", "adapter", "audio"]))
    assert config.model.video is not None
    encoder = dataclasses.replace(config.model.video.encoder, adapter=EncoderAdapterConfig(rank=2))
    video = dataclasses.replace(config.model.video, encoder=encoder)
    with pytest.raises(ValueError, match=r"frozen encoders give; model.video.encoder.adapter is set"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, video=video))
    with pytest.raises(
        ValueError, match=r"metric measures answers, for which data.features leaves the run no encoders"
    ):
        train(config, metric=lambda model, processor: {})
    with pytest.raises(ValueError, match=r"data.features.versions is 0"):
        FeatureConfig(folder="x", versions=0)


def held_out(world: Path) -> Path:
    """A manifest of clips that can be read, each under the id of another sample that is trained on."""
    good = [sample for sample in read_manifest(world / "train.jsonl", world) if sample.id != "broken"]
    named = [dataclasses.replace(one, id=other.id) for one, other in zip(good, reversed(good), strict=True)]
    write_manifest(world / "held_out.jsonl", named[::2])
    return world / "held_out.jsonl"


def validated(world: Path) -> dict[str, Any]:
    """What validates a run, and masks what it trains on."""
    return {"validation": [str(held_out(world))], "video_mask_frames": [4, 5], "flip_probability": 0.5}


@pytest.fixture(scope="module")
def validated_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the files themselves that validates."""
    return train(settings_of(world, tmp_path_factory.mktemp("validated") / "files", **validated(world)))


@pytest.mark.parametrize("num_processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_validation_says_the_same_with_features_as_without(
    world: Path, validated_run: Path, tmp_path: Path, num_processes: int
) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"), versions=2, seed=3)
    config = settings_of(world, tmp_path / "features", features=kept, **validated(world))
    for rank in range(num_processes):
        make_features(config, rank=rank, num_ranks=num_processes)
    train(config)
    said = []
    for run in (validated_run, tmp_path / "features"):
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        said.append({key: value for row in rows for key, value in row.items() if key.startswith("eval_loss")})
    assert len(said[0]) == 3  # the largest budget, the smallest, and their mean
    assert said[1] == pytest.approx(said[0], rel=1e-4)
    findings = check_features(tmp_path / "kept", config)
    assert [problem.partition(" ")[0] for problem in findings.problems] == ["broken", "broken"]
    # A tiny model's losses hardly move with its input, so what the encoders were fed is compared as well.
    store = FeatureStore(tmp_path / "kept" / building.VALIDATION, 1, None)
    store.read_index()
    model, processor = build(config.model)
    fingerprint = form_of(model.config, processor, config, augmented=False).fingerprint
    for sample in read_manifest(held_out(world), world):
        fed = [key_of(item, fingerprint[item.medium]) for item in processor.load_media(sample)]
        assert [kept.key for kept in store.entries[sample.id, 0]] == fed


def test_features_for_validation_are_looked_over_too(world: Path, tmp_path: Path) -> None:
    kept = FeatureConfig(folder=str(tmp_path / "kept"))
    config = settings_of(world, tmp_path / "run", features=kept)
    make_features(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=[str(held_out(world))]))
    problems = check_features(tmp_path / "kept", config).problems
    assert {f"{one.id} version 0: missing" for one in read_manifest(held_out(world), world)} <= set(problems)
    counts = []
    make_features(config, progress=lambda done, total: counts.append((done, total)))
    assert counts[-1][0] == counts[-1][1] == 1 + len(read_manifest(held_out(world), world))  # and the broken one again


def test_pooled_features_serve_the_budgets_of_validation(world: Path, tmp_path: Path) -> None:
    settings = pooled_settings(world, tmp_path, ["/4", "/8"], pooled=["audio"])
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, validation=[str(held_out(world))]),
        sampler=SamplerConfig(mode="points", points=["audio=/6"]),
    )
    config = build(settings.model)[0].config
    form = form_of(config, tiny.processor(settings.model), settings)
    assert form.pooled == {"audio": 2}


@torch.no_grad()
def test_features_pass_through_as_if_they_had_just_been_made() -> None:
    model = tiny.model(tiny.settings()).eval()
    media = {medium: tiny.random_media(medium, 24) for medium in ("image", "audio", "video")}
    before = {}
    for medium, item in media.items():
        lengths = None if medium == "image" else torch.tensor([item.raw_length])
        before[medium] = model.model.encode(medium, item.values[None], lengths)
    pass_features_through(model, model.model.compressors, {})
    for medium, item in media.items():
        encoder = model.model.encoder(medium)
        assert isinstance(encoder, KeptFeatures)
        lengths = None if medium == "image" else torch.tensor([item.raw_length])
        passed = model.model.encode(medium, before[medium].values, lengths)
        assert torch.equal(passed.values, before[medium].values)
        assert torch.equal(passed.lengths, before[medium].lengths)
        facts = encoder_facts(tiny.encoder_configs()[medium])
        assert encoder.hidden_size == facts.hidden_size
        smallest, lengths = encoder.smallest_input()
        assert model.model.encode(medium, smallest, lengths).values.shape[-1] == encoder.hidden_size


def pooled_settings(world: Path, output: Path, rates: list[str], **features) -> RunConfig:
    config = settings_of(world, output, features=FeatureConfig(folder=str(output / "kept"), seed=3, **features))
    audio, video = config.model.audio, config.model.video
    assert audio is not None
    assert video is not None
    video = dataclasses.replace(video, compressor=PoolConfig(), budgets=["/2", "/4"])
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, audio=dataclasses.replace(audio, budgets=rates), video=video)
    )


@torch.no_grad()
def test_pooled_features_give_the_same_soft_tokens(world: Path, tmp_path: Path) -> None:
    model = tiny.model(tiny.settings(("audio", "video"), video={"compressor": "pool", "budgets": ["/2", "/6"]})).eval()
    pooled = {"audio": 4, "video": 2}
    for medium, rates in (("audio", (4, 8, 20)), ("video", (2, 6))):
        items = [tiny.random_media(medium, length, seed=length) for length in (23, 45, 22)]
        if medium == "video":
            whole = [model.model.encode(medium, i.values[None], torch.tensor([i.raw_length])) for i in items]
        else:
            lengths = torch.tensor([item.raw_length for item in items])
            both = model.model.encode(medium, torch.stack([item.values for item in items]), lengths)
            whole = [type(both)(both.values[i : i + 1, : both.lengths[i]], both.lengths[i : i + 1]) for i in range(3)]
        form = Form({}, "float32", pooled)
        rows = [form.of(one.values[0, : int(one.lengths)], medium) for one in whole]
        assert [len(row) for row in rows] == [int(one.lengths) // pooled[medium] for one in whole]
        kept = KeptFeatures(model.model.encoder(medium), pooled[medium])
        stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        values, counts = kept(stacked, torch.tensor([item.raw_length for item in items]))
        for rate in rates:
            amounts = counts // rate
            soft = model.model.compress(
                medium,
                type(whole[0])(values, counts),
                num_tokens=amounts,
                rates=torch.full_like(amounts, rate),
                max_tokens=int(amounts.max()),
            )
            for index, one in enumerate(whole):
                count = one.lengths // rate
                assert int(count) == int(amounts[index])
                expected = model.model.compress(
                    medium, one, num_tokens=count, rates=torch.full_like(count, rate), max_tokens=int(count)
                )
                torch.testing.assert_close(soft[index, : int(count)], expected[0], rtol=1e-6, atol=1e-6)


def test_a_run_on_pooled_features_learns_what_one_on_whole_ones_does(world: Path, tmp_path: Path) -> None:
    runs = {}
    for name, options in {
        "whole": {},
        "pooled": {"pooled": ["audio", "video"]},
        "small": {"dtype": "bfloat16"},
    }.items():
        settings = pooled_settings(world, tmp_path / name, ["/4", "/8"], **options)
        runs[name] = load_file(train(settings) / TRAINABLES)
    for name, value in runs["whole"].items():
        torch.testing.assert_close(runs["pooled"][name], value, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(runs["small"][name], value, rtol=0.3, atol=0.02)
    sizes = {name: sum(file.stat().st_size for file in (tmp_path / name / "kept").glob("audio*")) for name in runs}
    assert sizes["pooled"] < 0.5 * sizes["whole"]
    assert sizes["small"] < 0.7 * sizes["whole"]
    other = pooled_settings(world, tmp_path / "pooled", ["/2", "/4"], pooled=["audio", "video"])
    with pytest.raises(ValueError, match=r"audio.pooled_frames was 4 and is 2"):
        train(dataclasses.replace(other, train=dataclasses.replace(other.train, out=str(tmp_path / "again"))))


@pytest.mark.parametrize(
    ("rates", "medium", "message"),
    [
        (["/2", "/5"], "audio", r"names audio, whose rates /2, /5 are multiples of no common one"),
        (["4", "8"], "audio", r"names audio, which trains at 8; only streams at rates"),
    ],
)
def test_what_cannot_be_kept_pooled_is_refused(
    world: Path, tmp_path: Path, rates: list[str], medium: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_features(pooled_settings(world, tmp_path, rates, pooled=[medium]))
    config = settings_of(world, tmp_path, features=FeatureConfig(folder=str(tmp_path / "kept"), pooled=["video"]))
    with pytest.raises(ValueError, match=r"names video, whose compressor does not average"):
        make_features(config)


def test_the_commands_build_and_check(
    world: Path, tmp_path: Path, capsys, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(world, tmp_path / "run", features=FeatureConfig(folder=str(tmp_path / "kept"), versions=2))
    config = tmp_path / "run.yaml"
    config.write_text(config_yaml(settings))
    build_words = ["features", "build", "--config", str(config)]
    check = ["features", "check", str(tmp_path / "kept")]
    assert main(check) == 2
    assert "holds no features" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(building.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
        assert main(build_words) == 2
        assert re.search(r"features may take [\d,]+ bytes and 1,000 are free there", capsys.readouterr().err)
    assert main(build_words) == 0
    assert "encoded 26 samples and versions, " in capsys.readouterr().out
    assert main(check) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"audio: \d+ items, \d+ rows \(every frame, float32\), 1 shards, [\d,]+ bytes; encoder \w{12}", shown
    )
    said = re.search(r"features at most: image 192, audio (\d+), video (\d+)", caplog.text)
    kept = [re.search(rf"{medium}: \d+ items, (\d+) rows", shown) for medium in ("audio", "video")]
    assert said is not None
    for most, rows in zip(said.groups(), kept, strict=True):
        assert rows is not None
        assert 0 < int(rows[1]) <= int(most)
    assert main([*check, "--config", str(config)]) == 1  # the broken audio
    assert "broken version 0: audio media/broken.wav" in capsys.readouterr().out.replace(str(world) + "/", "audio ")
    assert main([*check, "--config", str(config), "--data.flip_probability", "0.5"]) == 1
    assert "not of this config: video.flip_probability was 0.0 and is 0.5" in capsys.readouterr().out
    lines = (tmp_path / "kept" / "index-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept" / "index-0.jsonl").write_text(
        "".join(line for line in lines if '"see1", "version": 1' not in line)
    )
    shard = tmp_path / "kept" / "video-0-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert main([*check, "--config", str(config)]) == 1
    shown = capsys.readouterr().out
    assert "see1 version 1: missing" in shown
    assert "video-0-00000.safetensors is not what was written" in shown
    shard.unlink()
    assert main(check) == 1
    assert "video-0-00000.safetensors is gone" in capsys.readouterr().out
    assert main(["features", "build", "--config", str(config), "--processes", "0"]) == 2
    assert "processes is 0" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_build_what_one_builds(world: Path, tmp_path: Path) -> None:
    samples = read_manifest(world / "train.jsonl", world)
    stores = []
    for processes in (1, 2):
        config = settings_of(world, tmp_path, features=FeatureConfig(folder=str(tmp_path / str(processes)), versions=2))
        (tmp_path / "run.yaml").write_text(config_yaml(config))
        words = ["features", "build", "--config", str(tmp_path / "run.yaml"), "--processes", str(processes)]
        assert main(words) == 0
        stores.append(FeatureStore(tmp_path / str(processes), 2))
        stores[-1].read_index()
        assert [sample.id for sample, _ in stores[-1].missing(samples)] == ["broken", "broken"]
    for sample in samples[:-1]:
        for epoch in range(2):
            for one, two in zip(stores[0].load(sample, epoch), stores[1].load(sample, epoch), strict=True):
                torch.testing.assert_close(one.values, two.values)


def state_of(pid: int | str) -> tuple[str, int]:
    """The state of a process, X where it is gone, and which started it."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def is_running(pid: int) -> bool:
    return state_of(pid)[0] not in "XZ"


def children_of(pid: int) -> set[int]:
    """Running processes that a process has started."""
    every = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return {process for process in every if is_running(process) and state_of(process)[1] == pid}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_sigterm_to_a_build_ends_its_workers(world: Path, tmp_path: Path) -> None:
    config = settings_of(world, tmp_path, features=FeatureConfig(folder=str(tmp_path / "kept"), versions=400))
    (tmp_path / "run.yaml").write_text(config_yaml(config))
    words = ["features", "build", "--config", str(tmp_path / "run.yaml"), "--processes", "2"]
    build = subprocess.Popen([sys.executable, "-m", "mllm", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "kept" / "fingerprint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    workers = children_of(build.pid)
    assert len(workers) >= 2
    build.terminate()
    assert build.wait(30) == 128 + signal.SIGTERM
    ended = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < ended:
        time.sleep(0.2)
    assert not [pid for pid in workers if is_running(pid)]
