"""Routers of speech know how noisy a recording was when it was answered about, and which noise that was."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from mllm.budget import Budget
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.answer_table import tables_of
from mllm.evaluation.noise import EvaluationNoise, noise_of_answers, read_noise
from mllm.evaluation.router_fitting import Answers, with_features
from mllm.evaluation.sweep import Sweep
from mllm.evaluation.work_list import Work
from mllm.media import DEFAULT_LIMITS
from mllm.router.features import FACTS, NOISE, QUESTION
from mllm.transforms.noise import estimated_snr_db
from mllm.utils.files import digest_of_file

BUDGETS = ("audio=/8", "audio=/4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(2):
        speech = rng.normal(0, 0.1, 12_000)
        speech[4_000:8_000] = 0  # a pause
        soundfile.write(tmp_path / f"{number}.wav", speech.astype(np.float32), 16_000)
    for name in ("noise", "other"):
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(0, 0.1, 16_000).astype(np.float32), 16_000)
    return tmp_path


def sample(folder: Path, number: int) -> Sample:
    parts = (Media("audio", f"{number}.wav"), Text("transcribe speech to text."))
    messages = (Message("user", parts), Message("assistant", (Text("go"),)))
    return dataclasses.replace(Sample(str(number), messages, "asr"), root=folder)


def test_each_question_is_described_by_what_was_heard(folder: Path) -> None:
    samples = {("test", str(number)): sample(folder, number) for number in range(2)}
    lines = [
        {
            **{"set": name, "id": id_, "snr_db": snr_db, "budget": budget, "task": "asr", "kind": None},
            **{"references": ["go"], "hypothesis": "go", "min_probability": 0.5, "tokens": {"audio": 4}, "cost": None},
        }
        for name, id_ in samples
        for snr_db in (None, 0.0)
        for budget in BUDGETS
    ]
    noise = EvaluationNoise(read_noise(str(folder / "noise.wav"), DEFAULT_LIMITS), seed=3)
    table = tables_of(lines, samples)["audio",]
    assert table.snrs_db == (None, 0.0, None, 0.0)
    assert table.kinds == ("clean", "0 dB") * 2
    assert len(table.units()) == 2, "a clip is one clip in quiet and in noise"
    assert table.take([1]).snrs_db == (0.0,)
    config = tiny.settings(("audio",))
    model, processor = tiny.model(config), tiny.processor(config)
    described = with_features(table, Answers(lines, samples, noise), model, processor)
    assert set(described.features) == {QUESTION, FACTS, NOISE}
    sweep = Sweep(None, None, noise=noise.recording, seed=3)  # type: ignore[arg-type]
    for row, (id_, snr_db) in enumerate([("0", None), ("0", 0.0), ("1", None), ("1", 0.0)]):
        audio = processor.read_media(samples["test", id_])[0]
        mix = sweep._noise_of(Work("test", samples["test", id_], snr_db, (Budget.parse(BUDGETS[0]),)))
        heard = audio if mix is None else mix(audio)
        assert described.features[NOISE][row, 0] == estimated_snr_db(heard)
    assert described.features[NOISE][0, 0] > described.features[NOISE][1, 0] + 10


def test_the_noise_of_answers_is_found_by_its_bytes(folder: Path) -> None:
    fingerprint = {"noise": {"file": digest_of_file(folder / "noise.wav"), "seed": 5}}
    files = [str(folder / name) for name in ("other.wav", "noise.wav")]
    noise = noise_of_answers(fingerprint, files, DEFAULT_LIMITS, folder="run")
    assert noise is not None
    assert noise.seed == 5
    np.testing.assert_array_equal(noise.recording.samples, read_noise(files[1], DEFAULT_LIMITS).samples)
    assert noise_of_answers({"noise": None}, files, DEFAULT_LIMITS, folder="run") is None
    with pytest.raises(ValueError, match=r"run holds answers under noise; name the recording in noise \(given: none\)"):
        noise_of_answers(fingerprint, [], DEFAULT_LIMITS, folder="run")
    with pytest.raises(ValueError, match="name the recording in noise"):
        noise_of_answers(fingerprint, files[:1], DEFAULT_LIMITS, folder="run")
