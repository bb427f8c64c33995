"""What the data block says is what a run reads and how it loads it."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch

from mllm.budget import Budget
from mllm.cli import parse
from mllm.config.data import ReaderConfig
from mllm.config.run import DataConfig, config_yaml, read_run_config
from mllm.data.dataset import ManifestDataset
from mllm.data.shared_media import samples_that_share
from mllm.media import write_video
from mllm.processing.batch import Batch
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.loaders import build_augmentation, encode, loading, read_samples, train_loader
from mllm.training.pipeline.token_scan import scan_tokens
from mllm.transforms.augmentation import TimeMask

MODEL = {"llm": "l", "audio": {"encoder": "e", "budgets": ["/4"]}}


def test_a_run_config_may_name_lists_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "lrs2").mkdir()
    write_video(tmp_path / "lrs2/1.mp4", np.zeros((5, 16, 16), np.uint8))
    (tmp_path / "train.csv").write_text("lrs2,1.mp4,5,0,Well, yes\n")
    values = {
        "model": MODEL,
        "data": {
            "train": [str(tmp_path / "train.csv")],
            "reader": {"format": "omni_csv", "tasks": ["vsr"], "text": "lower", "prompts": {"vsr": "read."}},
        },
        "train": {"out": "o", "max_steps": 1},
    }
    settings = read_run_config(values)
    (sample,) = read_samples(settings.data.train, settings.data)
    assert [message.text for message in sample.messages] == ["read.", "well, yes"]
    assert "format: omni_csv" in config_yaml(settings)
    with pytest.raises(ValueError, match="omni_csv"):
        read_run_config({**values, "data": {"train": ["x"], "reader": {"format": "csv"}}})
    folder = DataConfig(train=[str(tmp_path)], reader=ReaderConfig(format="clips"))
    with pytest.raises(ValueError, match="there is no sample in it"):  # a folder of a clip without a transcript
        read_samples(folder.train, folder)


def test_questions_that_a_server_judges_teach_nothing(tmp_path: Path) -> None:
    (tmp_path / "llava_test.jsonl").write_text('{"question_id": "a.jpg", "image": "a.jpg", "text": "What?"}\n')
    settings = DataConfig(train=[str(tmp_path)], reader=ReaderConfig(format="vizwiz"))
    with pytest.raises(ValueError, match=r"'a\.jpg' has no answer to learn from"):
        read_samples(settings.train, settings)


def test_the_command_line_reaches_the_reader_and_the_masks() -> None:
    words = [
        "train",
        "--model.llm",
        "l",
        "--model.adapter",
        "lora",
        "--data.train",
        "a.csv",
        "--train.out",
        "o",
        "--train.max_steps",
        "1",
    ]
    batches = [
        "--data.reader.format",
        "omni_csv",
        "--data.reader.tasks",
        "avsr",
        "--data.audio-mask-samples",
        "[6400,16000]",
    ]
    _, settings = parse([*words, *batches])
    assert settings.data.reader == ReaderConfig(format="omni_csv", tasks=["avsr"])
    assert settings.data.audio_mask_samples == [6400, 16000]


def test_augmentation_is_what_the_data_block_says(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "noise.wav", np.full(100, 0.5), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(100), 16_000)
    settings = {"audio_mask_samples": [6400, 16000], "snr_db": [None, 0.0], "flip_probability": 0.5}
    made = build_augmentation(DataConfig(train=["a"], noise=str(tmp_path / "noise.wav"), **settings))
    assert made.noise is not None
    assert made.noise.choices == (None, 0.0)
    assert (made.audio_mask, made.video_mask, made.flip_probability) == (TimeMask(6400, 16000), None, 0.5)
    with pytest.raises(ValueError, match=r"data\.noise .*silent\.wav: the noise is silent throughout"):
        build_augmentation(DataConfig(train=["a"], noise=str(tmp_path / "silent.wav"), **settings))


def test_a_run_on_a_list_draws_the_same_whoever_loads_it(tmp_path: Path) -> None:
    """A CSV, masks, noise and mirroring: epochs differ, and the number of workers does not matter."""
    rng = np.random.default_rng(0)
    (tmp_path / "c").mkdir()
    for number in range(3):
        frames = rng.integers(0, 255, (25, 40, 40), dtype=np.uint8)
        write_video(tmp_path / f"c/{number}.mp4", frames)
        soundfile.write(tmp_path / f"c/{number}.wav", rng.normal(0, 0.1, 15_500), 16_000)
    soundfile.write(tmp_path / "noise.wav", rng.normal(0, 0.1, 8_000), 16_000)
    (tmp_path / "l.csv").write_text("".join(f"c,{n}.mp4,25,0,place blue, now\n" for n in range(3)))
    processor = tiny.processor(tiny.settings(("audio", "video")))

    def batches(num_workers: int) -> list[dict]:
        settings = DataConfig(
            train=[str(tmp_path / "l.csv")],
            reader=ReaderConfig(format="omni_csv", tasks=["avsr"]),
            noise=str(tmp_path / "noise.wav"),
            snr_db=[0.0, None],
            audio_mask_samples=[1_600, 16_000],
            video_mask_frames=[5, 25],
            flip_probability=0.5,
            num_workers=num_workers,
            max_rows=1,
        )
        samples = read_samples(settings.train, settings)
        loader = train_loader(
            ManifestDataset(samples, load=loading(settings, processor, augmented=True), seed=0),
            scan_tokens(samples, processor),
            config=settings,
            encode=partial(encode, processor=processor, budgets=[Budget.parse("audio=/4,video=/2")]),
            run=tmp_path / "run",
            seed=0,
            slots=RankSlots(),
        )
        loaded = [batch["batch"] for batch in islice(loader, 6)]
        return [{"id": batch.rows[0].sample_id, **batch.values} for batch in loaded]

    here, there = batches(0), batches(1)
    for one, other in zip(here, there, strict=True):
        assert one["id"] == other["id"]
        assert one["audio_lengths"].tolist() == [16_000]
        assert torch.equal(one["audio_values"], other["audio_values"])
        assert torch.equal(one["video_values"], other["video_values"])
    again = next(batch for batch in here[3:] if batch["id"] == here[0]["id"])
    assert not torch.equal(here[0]["video_values"], again["video_values"])


def test_tasks_of_a_clip_share_its_media_where_asked(tmp_path: Path) -> None:
    """Every clip is decoded, augmented and encoded once for its three tasks; the rows say the same as without."""
    rng = np.random.default_rng(0)
    (tmp_path / "c").mkdir()
    for number in range(4):
        write_video(tmp_path / f"c/{number}.mp4", rng.integers(0, 255, (25, 40, 40), dtype=np.uint8))
        soundfile.write(tmp_path / f"c/{number}.wav", rng.normal(0, 0.1, 16_000), 16_000)
    (tmp_path / "l.csv").write_text("".join(f"c,{n}.mp4,25,0,place blue, now\n" for n in range(4)))
    processor = tiny.processor(tiny.settings(("audio", "video")))

    def epoch(share_media: bool) -> list[Batch]:
        settings = DataConfig(
            train=[str(tmp_path / "l.csv")],
            reader=ReaderConfig(format="omni_csv", tasks=["asr", "vsr", "avsr"]),
            flip_probability=0.5,
            share_media=share_media,
            num_workers=0,
            max_rows=6,
        )
        samples = read_samples(settings.train, settings)
        groups = samples_that_share(samples) if share_media else None
        loader = train_loader(
            ManifestDataset(samples, load=loading(settings, processor, augmented=True), seed=0, groups=groups),
            scan_tokens(samples, processor),
            config=settings,
            encode=partial(encode, processor=processor, budgets=[Budget.parse("audio=/4,video=/2")]),
            run=tmp_path / f"run{share_media}",
            seed=0,
            slots=RankSlots(),
        )
        return [batch["batch"] for batch in islice(loader, 2)]

    shared, apart = epoch(True), epoch(False)
    for batches, count in ((shared, 4), (apart, 8)):
        assert sum(len(batch.values["audio_values"]) for batch in batches) == count
        assert sum(len(batch.values["video_values"]) for batch in batches) == count
    for batch in shared:
        assert [row.task for row in batch.rows] == ["asr", "vsr", "avsr"] * 2
        items = [[span.item for span in row.spans] for row in batch.rows]
        assert items == [[0], [0], [0, 0], [1], [1], [1, 1]]
    ids = [{row.sample_id: list(row.ids) for batch in batches for row in batch.rows} for batches in (shared, apart)]
    assert ids[0] == ids[1]
