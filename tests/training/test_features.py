"""Features that are kept: what is learned from them is what is learned from the files, and nothing stale is read."""

import dataclasses
import json
from pathlib import Path

import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file

from mllm.building import build
from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.encoders import encoder_facts
from mllm.loading import TRAINABLES, load
from mllm.settings import EncoderAdapterSettings
from mllm.training.features import (
    FeatureStore,
    KeptFeatures,
    claim,
    features_fingerprint,
    fill_store,
    pass_features_through,
)
from mllm.training.loaders import loading
from mllm.training.run import make_features, train
from mllm.training.settings import DataSettings, FeatureSettings, RunSettings, SamplerSettings, TrainSettings

KINDS = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video"), "see": ("image",)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a tiny model, and clips and pictures in tasks that share files; one sound is broken."""
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


def settings_of(world: Path, output: Path, *, features: FeatureSettings | None = None, **data) -> RunSettings:
    model = tiny.settings_on({name: str(world / "parts" / name) for name in ("llm", "image", "audio", "video")})
    own = {"tokens_per_batch": 512, "max_rows": 4, "num_workers": 0, "max_bad_fraction": 0.2, **data}
    noisy = {"noise": str(world / "noise.wav"), "snr_db": [None, 0.0]}
    return RunSettings(
        model=model,
        data=DataSettings(train=[str(world / "train.jsonl")], features=features, **noisy, **own),
        sampler=SamplerSettings(mode="all"),
        train=TrainSettings(output=str(output), epochs=2, learning_rate=1e-3, progress=False, use_cpu=True, seed=3),
    )


@pytest.mark.parametrize("made_before", [False, True])
def test_with_a_version_per_epoch_nothing_but_the_speed_changes(world: Path, tmp_path: Path, made_before: bool) -> None:
    train(settings_of(world, tmp_path / "files"))
    own = settings_of(
        world, tmp_path / "features", features=FeatureSettings(folder=str(tmp_path / "kept"), versions=2, seed=3)
    )
    if made_before:
        for rank in range(2):
            make_features(own, rank=rank, num_ranks=2)
    train(own)
    files, features = (load_file(tmp_path / name / TRAINABLES) for name in ("files", "features"))
    assert files.keys() == features.keys()
    for name, value in files.items():
        torch.testing.assert_close(features[name], value, rtol=1e-3, atol=1e-5)
    bad = [json.loads(line) for line in (tmp_path / "features" / "quarantine-0.jsonl").read_text().splitlines()]
    assert {row["id"] if "id" in row else row["sample_id"] for row in bad} == {"broken"}
    load(tmp_path / "features")


def filled(world: Path, folder: Path, *, versions: int = 2, ranks: int = 1) -> tuple[FeatureStore, list[Sample]]:
    own = settings_of(world, folder)
    model, processor = build(own.model)
    samples = read_manifest(world / "train.jsonl", world)
    sizes = {medium: model.model.tower(medium).hidden_size for medium in model.model.compressors}
    for rank in range(ranks):
        store = FeatureStore(folder, sizes, versions, 3)
        folder.mkdir(exist_ok=True)
        fill_store(
            store, model.eval(), samples, loading(own.data, processor, augmented=True), rank=rank, num_ranks=ranks
        )
    store = FeatureStore(folder, sizes, versions, 3)
    store.read_index()
    return store, samples


def test_equal_inputs_are_kept_once_and_versions_repeat(world: Path, tmp_path: Path) -> None:
    store, samples = filled(world, tmp_path / "kept")
    by_id = {sample.id: sample for sample in samples}
    (first,) = store.load(by_id["vsr0"], 0)
    again = store.load(by_id["avsr0"], 0)[1]
    assert first.medium == again.medium == "video"
    sound = [store.load(by_id["asr1"], epoch)[0].values for epoch in range(4)]
    assert torch.equal(sound[0], sound[2])
    assert torch.equal(sound[1], sound[3])
    picture = [store.entries["see2", version][0].first_row for version in (0, 1)]
    assert picture[0] == picture[1]
    with pytest.raises(ValueError, match=r"broken.wav"):
        store.load(by_id["broken"], 0)


def test_two_processes_keep_what_one_keeps_and_a_kill_is_continued(world: Path, tmp_path: Path) -> None:
    one, samples = filled(world, tmp_path / "one")
    two, _ = filled(world, tmp_path / "two", ranks=2)
    index = tmp_path / "one" / "index-0.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:7]) + lines[7][:20])  # a kill in the middle of a line, and of a row of features
    with (tmp_path / "one" / "audio-0.bin").open("ab") as file:
        file.write(b"\0\0\0")
    continued, _ = filled(world, tmp_path / "one")
    for sample in samples:
        for version in range(2):
            if sample.id != "broken":
                expected = one.load(sample, version) if sample.id == samples[0].id else two.load(sample, version)
                for found, own in zip(continued.load(sample, version), expected, strict=True):
                    torch.testing.assert_close(found.values, own.values)
                    assert (found.medium, found.raw_length) == (own.medium, own.raw_length)


def test_a_file_that_changed_is_encoded_again(world: Path, tmp_path: Path) -> None:
    store, samples = filled(world, tmp_path / "kept", versions=1)
    assert [sample.id for sample, _ in store.missing(samples)] == ["broken"]
    path = world / "media" / "1.png"
    before = path.read_bytes()
    path.write_bytes((world / "media" / "2.png").read_bytes())
    try:
        assert [sample.id for sample, _ in store.missing(samples)] == ["see1", "broken"]
    finally:
        path.write_bytes(before)


def test_features_of_something_else_are_refused(world: Path, tmp_path: Path) -> None:
    kept = FeatureSettings(folder=str(tmp_path / "kept"))
    train(settings_of(world, tmp_path / "one", features=kept))
    with pytest.raises(
        ValueError, match=r"data.features.folder .*kept holds features of something else \(image.seed was 0"
    ):
        train(settings_of(world, tmp_path / "two", features=dataclasses.replace(kept, seed=1)))


def test_features_of_other_masks_are_something_else(world: Path, tmp_path: Path) -> None:
    own = FeatureSettings(folder=str(tmp_path / "kept"))
    model, processor = build(settings_of(world, tmp_path).model)

    def fingerprint(**data) -> dict:
        return features_fingerprint(model.config, processor, settings_of(world, tmp_path, features=own, **data).data)

    plain, masked = fingerprint(), fingerprint(audio_mask_samples=[1_600, 16_000])
    assert plain != masked
    assert plain["video"] == masked["video"]  # a mask of the sound leaves the features of videos as they are
    assert plain["video"] != fingerprint(flip_probability=0.5)["video"]
    claim(tmp_path / "kept", plain)
    with pytest.raises(ValueError, match=r"audio\.audio_mask_samples was \[\] and is \[1600, 16000\]"):
        claim(tmp_path / "kept", masked)


def test_what_learns_or_answers_needs_its_encoders(world: Path, tmp_path: Path) -> None:
    kept = FeatureSettings(folder=str(tmp_path / "kept"))
    own = settings_of(world, tmp_path / "run", features=kept)
    with pytest.raises(ValueError, match=r"frozen encoders give, but train.parts holds audio"):
        dataclasses.replace(own, train=dataclasses.replace(own.train, parts=["compressors", "adapter", "audio"]))
    assert own.model.video is not None
    video = dataclasses.replace(own.model.video, encoder_adapter=EncoderAdapterSettings(rank=2))
    with pytest.raises(ValueError, match=r"frozen encoders give; model.video has an encoder_adapter"):
        dataclasses.replace(own, model=dataclasses.replace(own.model, video=video))
    with pytest.raises(ValueError, match=r"data.validation cannot be answered"):
        settings_of(world, tmp_path / "run", features=kept, validation=[str(world / "train.jsonl")])
    with pytest.raises(ValueError, match=r"data.features.versions is 0"):
        FeatureSettings(folder="x", versions=0)


@torch.no_grad()
def test_features_pass_through_as_if_they_had_just_been_made() -> None:
    model = tiny.model(tiny.settings()).eval()
    given = {medium: tiny.random_media(medium, 24) for medium in ("image", "audio", "video")}
    before = {}
    for medium, own in given.items():
        lengths = None if medium == "image" else torch.tensor([own.raw_length])
        before[medium] = model.model.encode(medium, own.values[None], lengths)
    pass_features_through(model)
    for medium, own in given.items():
        tower = model.model.tower(medium)
        assert isinstance(tower, KeptFeatures)
        lengths = None if medium == "image" else torch.tensor([own.raw_length])
        found = model.model.encode(medium, before[medium].values, lengths)
        assert torch.equal(found.values, before[medium].values)
        assert torch.equal(found.lengths, before[medium].lengths)
        facts = encoder_facts(tiny.encoder_configs()[medium])
        assert tower.hidden_size == facts.hidden_size
        smallest, lengths = tower.smallest_input()
        assert model.model.encode(medium, smallest, lengths).values.shape[-1] == tower.hidden_size
