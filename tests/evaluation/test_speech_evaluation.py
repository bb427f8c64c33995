"""Speech from files to the table: tasks by rates by noise, refusals, a killed run that goes on, two processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from answer_lines import assert_same_answers

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.cli import main
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.answer_store import ANSWERS, FINGERPRINT, HYPOTHESES, AnswerStore
from mllm.evaluation.comparison import DATA, MARKDOWN, PLOT
from mllm.evaluation.report import CSV, RESULTS, summarise
from mllm.evaluation.run import gather
from mllm.evaluation.sweep import Sweep
from mllm.evaluation.work_list import Work
from mllm.inference.answerer import Answerer, Decoding
from mllm.media import Audio, load_audio
from mllm.model.trainables import set_trainables

ROOT = Path(__file__).parents[2]
TASKS = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}
BUDGETS = "audio=/4,video=/2;audio=/4,video=/5;audio=/8,video=/2;audio=/8,video=/5"
COLUMNS = ["ASR (4)", "ASR (8)", "VSR (2)", "VSR (5)", "AVSR (4,2)", "AVSR (4,5)", "AVSR (8,2)", "AVSR (8,5)"]
_ENDINGS = {"audio": "wav", "video": "mp4"}
FILES = (HYPOTHESES, RESULTS, CSV, MARKDOWN, DATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of random weights, a manifest of three rows per utterance, and noise."""
    made = tmp_path_factory.mktemp("speech")
    model, processor = build(tiny.settings_on(tiny.write_parts(made / "parts"), ("audio", "video")))
    set_trainables(model)
    save_run(model, processor, made / "run")
    samples = []
    for number in range(6):
        names = tiny.write_media(made / "media", seed=number, seconds=0.5 + 0.05 * number)
        for task, media in TASKS.items():
            parts = (*(Media(medium, names[medium]) for medium in media), Text("transcribe."))  # type: ignore[arg-type]
            messages = (Message("user", parts), Message("assistant", (Text("place blue now"),)))
            samples.append(Sample(f"u{number}-{task}", messages, task))
    write_manifest(made / "media" / "test.jsonl", samples)
    noise = np.random.default_rng(9).normal(0, 0.03, 24_000).astype(np.float32)
    soundfile.write(made / "noise.wav", noise, 16_000)
    return made


def words(folder: Path, output: Path, *more: str) -> list[str]:
    arguments = ["evaluate", "--model", str(folder / "run"), "--manifest", str(folder / "media" / "test.jsonl")]
    arguments += ["--budgets", BUDGETS, "--noise", str(folder / "noise.wav"), "--snr_db", "null", "--snr_db", "0"]
    return [*arguments, "--num_beams", "3", "--max_new_tokens", "5", "--out", str(output), "--use_cpu", *more]


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Path:
    """What one undisturbed process finds."""
    assert main(words(folder, folder / "alone")) == 0
    return folder / "alone"


def test_tasks_rates_and_noise_end_in_the_papers_table(folder: Path, one_process: Path) -> None:
    lines = [json.loads(line) for line in (one_process / HYPOTHESES).read_text().splitlines()]
    # Audio at two ratios and lips at one; each task at its own rates.
    assert len(lines) == 6 * (2 * 2 + 2 + 2 * 4)
    assert {line["snr_db"] for line in lines if line["task"] == "vsr"} == {None}
    blocks = json.loads((one_process / DATA).read_text())["blocks"]
    assert [block["title"] for block in blocks] == ["test, clean", "test, SNR 0 dB"]
    assert [block["columns"] for block in blocks] == [COLUMNS, COLUMNS]
    cells = [block["models"]["run"]["cells"] for block in blocks]
    assert cells[0]["VSR (2)"] == cells[1]["VSR (2)"]
    for name, tokens in (("ASR (4)", 12.5), ("ASR (8)", 6.25), ("VSR (2)", 12.5), ("AVSR (4,2)", 25.0)):
        cell = cells[0][name]
        assert cell["tokens_per_second"] == pytest.approx(tokens, rel=0.12)  # what does not fill a token is dropped
        errors = cell["substitutions"] + cell["deletions"] + cell["insertions"]
        assert cell["value"] == errors / cell["reference_words"]
        assert cell["low"] <= cell["value"] <= cell["high"]
        assert cell["cer_low"] <= cell["cer"] <= cell["cer_high"]
        assert cell["reference_words"] == 6 * 3
        edits = [cell[f"character_{edit}"] for edit in ("substitutions", "deletions", "insertions")]
        assert cell["cer"] == sum(edits) / cell["reference_characters"]
    assert cells[0]["AVSR (4,2)"]["published_tflops"] > cells[0]["AVSR (8,5)"]["published_tflops"] > 0
    assert (one_process / PLOT).stat().st_size > 10_000


def test_generate_with_beams_says_what_evaluate_writes(folder: Path, one_process: Path, capsys) -> None:
    lines = [json.loads(line) for line in (one_process / HYPOTHESES).read_text().splitlines()]
    request = [
        "generate",
        "--model",
        str(folder / "run"),
        "--text",
        "transcribe.",
        "--max_new_tokens",
        "5",
        "--use_cpu",
    ]
    for sample, budget in (("u3-avsr", "audio=/8,video=/2"), ("u5-asr", "audio=/4")):
        media = TASKS[sample[3:]]
        files = [f"--{medium}={folder / 'media' / f'{sample[1]}.{_ENDINGS[medium]}'}" for medium in media]
        assert main([*request, *files, "--budget", budget, "--num_beams", "3"]) == 0
        line = next(one for one in lines if (one["id"], one["budget"], one["snr_db"]) == (sample, budget, None))
        assert capsys.readouterr().out.strip() == line["hypothesis"]
    assert main([*request, "--length_penalty", "2"]) == 2
    assert "length_penalty is 2.0 with num_beams 1; it compares beams" in capsys.readouterr().err


def test_zero_decibels_are_zero_decibels(folder: Path, tmp_path: Path) -> None:
    audio = load_audio(folder / "media" / "0.wav")
    answerer = Answerer(*load(str(folder / "run")), Decoding())
    sweep = Sweep(answerer, AnswerStore(tmp_path), noise=load_audio(folder / "noise.wav"))
    for ratio in (0, 0.0, -5.0, 7.5):
        mix = sweep._noise_of(Work("test", Sample("u", (), "asr"), ratio, ()))
        assert mix is not None
        noise = mix(Audio(audio.samples, 16_000)).samples - audio.samples
        measured = 10 * np.log10(np.mean(audio.samples.astype(float) ** 2) / np.mean(noise.astype(float) ** 2))
        assert measured == pytest.approx(ratio, abs=1e-3)


def test_rates_that_were_not_trained_are_refused_unless_allowed(folder: Path, tmp_path: Path, capsys) -> None:
    arguments = words(folder, tmp_path / "out")
    arguments[arguments.index(BUDGETS)] = "audio=/5,video=/2"
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "budget 'audio=/5,video=/2' was not trained (audio: /4, /8; video: /2, /5); allow_untrained" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--allow_untrained", "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    assert "ASR (5)" in shown
    assert "* a rate that was not trained" in shown
    text = (tmp_path / "out" / MARKDOWN).read_text()
    assert "* a rate that was not trained" in text
    # Tokens per second are a rate only where the sample tells the frames: it is refused there, and named.
    arguments[arguments.index("audio=/5,video=/2")] = "audio=10/s"
    arguments[arguments.index(str(tmp_path / "out"))] = str(tmp_path / "per_second")
    arguments[arguments.index(str(folder / "media" / "test.jsonl"))] = str(_only_asr(folder, tmp_path))
    assert main(arguments) == 1
    assert "failed: asr u0-asr at audio=10/s: sample 'u0-asr': budget 'audio=10/s' was not" in capsys.readouterr().err


def _only_asr(folder: Path, tmp_path: Path) -> Path:
    rows = [row for row in (folder / "media" / "test.jsonl").read_text().splitlines() if '-asr"' in row]
    (folder / "media" / "asr.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "media" / "asr.jsonl"


@pytest.mark.parametrize("seed", range(2))
def test_any_split_of_the_answers_merges_to_the_same_numbers(one_process: Path, tmp_path: Path, seed: int) -> None:
    lines = [json.loads(line) for line in (one_process / HYPOTHESES).read_text().splitlines()]
    rng = random.Random(seed)
    shuffled = rng.sample(lines, len(lines))
    num_ranks = rng.randint(2, 6)
    for rank in range(num_ranks):
        store = AnswerStore(tmp_path, rank=rank)
        store.claim({})
        store.append(
            [line for line in shuffled if len(line["id"] + line["budget"] + line["hypothesis"]) % num_ranks == rank]
        )
    merged = gather(_work_of(lines), AnswerStore(tmp_path))
    assert merged == lines
    whole = json.loads((one_process / RESULTS).read_text())
    assert json.loads(json.dumps(summarise(merged, seed=0).rows)) == whole["rows"]


def _work_of(lines: list[dict]) -> list[Work]:
    """A work list that names the answers of a file in its order."""
    return [
        Work(
            line["set"],
            Sample(line["id"], (), line["task"]),
            line["snr_db"],
            (Budget.parse(line["budget"]),),
            media_stamp=line["media_stamp"],
        )
        for line in lines
    ]


def start(*command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, start_new_session=True)


def assert_same_results(one: Path, other: Path) -> None:
    for name in FILES:
        if name == HYPOTHESES:
            assert_same_answers(one / name, other / name)
        else:
            assert (one / name).read_text() == (other / name).read_text(), name


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder: Path, one_process: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm"]
    process = start(*launcher, *words(folder, tmp_path / "two"))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()[-3000:]
    assert {file.name for file in (tmp_path / "two" / ANSWERS).iterdir()} == {"0.jsonl", "1.jsonl"}
    assert_same_results(one_process, tmp_path / "two")


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(folder: Path, one_process: Path, tmp_path: Path) -> None:
    arguments, answers = words(folder, tmp_path / "out", "--batch_size", "1"), tmp_path / "out" / ANSWERS / "0.jsonl"
    process = start("-m", "mllm", *arguments)
    deadline = time.monotonic() + 200
    while not (answers.exists() and answers.read_text().count("\n") > 8):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = answers.read_text()
    kept = kept[: kept.rindex("\n") + 1]
    assert 8 < kept.count("\n") < 84
    assert (tmp_path / "out" / FINGERPRINT).exists()
    assert main(arguments) == 0
    assert answers.read_text().startswith(kept)  # nothing is answered again
    assert_same_results(one_process, tmp_path / "out")
