"""What the corpus promises: files that other programs read, audio and lips of one length, splits that share nothing."""

from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mllm.data.manifest import Sample, read_manifest
from mllm.media import write_video
from mllm.synthetic.prompts import SPEECH_TASKS
from mllm.synthetic.speech.corpus import SpeechCorpusConfig, write_speech_corpus
from mllm.synthetic.speech.lips import LIP_FRAMES_PER_SECOND, draw_lips
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ, synthesise
from mllm.synthetic.speech.voices import VOICES

SETTINGS = SpeechCorpusConfig(num_train=5, num_validation=3, num_test=3, seed=4, babble_seconds=3)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    calls: list[tuple[int, int]] = []
    write_speech_corpus(root, SETTINGS, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 11) for done in range(1, 12)]
    return root


def rows(corpus: Path, split: str) -> list[Sample]:
    return read_manifest(corpus / f"{split}.jsonl", corpus)


def test_audio_and_lips_read_back_with_one_length(corpus: Path) -> None:
    samples = [sample for split in SPLITS for sample in rows(corpus, split) if sample.task == "avsr"]
    assert len(samples) == 5 + 3 + 3
    for sample in samples:
        audio, film = (corpus / media.path for media in sample.media)
        waveform, rate_hz = soundfile.read(audio)
        assert (rate_hz, waveform.ndim) == (SAMPLE_RATE_HZ, 1)
        with av.open(str(film)) as container:
            stream = container.streams.video[0]
            num_frames = sum(1 for _ in container.decode(stream))
            assert (stream.codec_context.name, stream.average_rate) == ("h264", LIP_FRAMES_PER_SECOND)
            assert (stream.width, stream.height) == (48, 48)
        audio_seconds = len(waveform) / rate_hz
        assert abs(num_frames / LIP_FRAMES_PER_SECOND - audio_seconds) < 0.08
        assert audio_seconds == pytest.approx(sample.meta["seconds"], abs=1e-3)


def test_rows_ask_with_the_prompt_of_their_media(corpus: Path) -> None:
    for sample in rows(corpus, "test"):
        question, answer = sample.messages
        assert tuple(media.medium for media in sample.media) == SPEECH_TASKS[question.text]
        assert answer.text
    assert [sample.task for sample in rows(corpus, "test")] == ["asr", "vsr", "avsr"] * 3


def test_splits_share_no_sentence_and_no_voice(corpus: Path) -> None:
    sentences = {split: {sample.messages[-1].text for sample in rows(corpus, split)} for split in SPLITS}
    voices = {split: {sample.meta["voice"] for sample in rows(corpus, split)} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        assert not sentences[first] & sentences[second]
        assert not voices[first] & voices[second]
    babble = [soundfile.read(corpus / f"noise/{split}.wav")[0] for split in SPLITS]
    assert all(np.abs(np.corrcoef(a, b)[0, 1]) < 0.2 for a, b in combinations(babble, 2))


@pytest.mark.slow
def test_two_workers_write_what_one_writes(corpus: Path, tmp_path: Path) -> None:
    write_speech_corpus(tmp_path, SETTINGS, num_workers=2)
    names = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((corpus / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


@pytest.mark.parametrize("color", [False, True])
def test_films_lose_little(tmp_path: Path, color: bool) -> None:
    phones = synthesise("we moved the boat", VOICES["train"][2]).phones
    frames = draw_lips(phones, face_seed=5, color=color)
    write_video(tmp_path / "lips.mp4", frames, frames_per_second=LIP_FRAMES_PER_SECOND)
    with av.open(str(tmp_path / "lips.mp4")) as container:
        decoded = np.stack(
            [frame.to_ndarray(format="rgb24" if color else "gray") for frame in container.decode(video=0)]
        )
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_test": 0}, "num_test must be at least 1 utterance, got 0"),
        ({"size_pixels": 47}, "size_pixels must be even for H.264, got 47"),
    ],
)
def test_settings_that_cannot_be_written_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechCorpusConfig(**changes)
