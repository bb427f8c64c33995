"""What the command line promises: quick help, the nearest name for what is unknown, one line for what went wrong."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import tiny
import torch

from mllm.cli import VERBS, main, parse, usage
from mllm.commands.options import parse_settings, without_extras
from mllm.config.model_options import ModelOptions
from mllm.config.nearest import nearest
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.media import MediaLimits
from mllm.utils.environment import Finding, Report

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block."""

    rate: float = 0.1
    """How fast."""
    mode: Literal["one", "two"] = "one"
    """Which way."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"block.rate is {self.rate}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Small:
    """Settings of a test."""

    name: str
    """A name."""
    block: Block = field(default_factory=Block)
    """A block."""
    other: Block | None = None
    """Another, or none."""
    files: list[str] = field(default_factory=list)
    """Some files."""
    levels: list[float | None] = field(default_factory=list)
    """Some numbers."""
    rates: dict[str, float] = field(default_factory=dict)
    """Numbers by name."""
    num_steps: int | None = None
    """Steps."""
    fast: bool = False
    """A switch."""


def small(*arguments: str) -> Small:
    return parse_settings(Small, arguments, program="test", positional="name")


def test_files_are_overridden_by_dotted_options(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("name: from file\nblock: {rate: 0.5}\nother: {mode: two}\nfiles: [x]\nrates: {a: 1}\n")
    read = small("--config", str(config), "--block.mode=two", "--num-steps", "3", "--fast")
    assert read == Small(
        name="from file",
        block=Block(rate=0.5, mode="two"),
        other=Block(mode="two"),
        files=["x"],
        rates={"a": 1.0},
        num_steps=3,
        fast=True,
    )
    assert small("--config", str(config), "--other.rate", "2").other == Block(rate=2, mode="two")
    assert small("--config", str(config), "--rates.b", "2").rates == {"a": 1.0, "b": 2.0}


def test_lists_switches_and_the_positional_may_be_written_as_people_do() -> None:
    read = small("a name", "--files", "x.png", "--fast", "--files", "12", "--levels", "null", "--levels", "-5")
    assert read == Small(name="a name", files=["x.png", "12"], levels=[None, -5.0], fast=True)
    assert small("n", "--files", '["a", "b"]', "--fast", "false") == Small(name="n", files=["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["n", "--num_step", "3"], "unknown option --num_step; did you mean num_steps?"),
        (["n", "--block.raet", "3"], "unknown option --block.raet; did you mean block.rate?"),
        (["n", "--mode", "two"], r"unknown option --mode; did you mean (block|other).mode\?"),
        (["n", "--zzzzz", "3"], "unknown option --zzzzz; allowed: config, name, block"),
        (["n", "--num_steps", "many"], "num_steps: expected int or null, got many"),
        (["n", "--block.rate", "quick"], "block.rate: expected float, got quick"),
        (["n", "--block.mode", "three"], r"block.mode: expected one of \['one', 'two'\], got three"),
        (["n", "--other.mode", "three"], r"other.mode: expected one of \['one', 'two'\], got three"),
        (["n", "--block.rate", "-1"], "block.rate is -1.0; it must be at least 0"),
        (["n", "--num_steps"], "--num_steps needs a value"),
        ([], "name"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: n\nblock: {raet: 1}\n", "unknown key block.raet in .*a.yaml; did you mean block.rate?"),
        ("name: n\nother: {rate: 1, mod: one}\n", "unknown key other.mod in .*a.yaml; did you mean other.mode?"),
        ("nme: n\n", "unknown key nme in .*a.yaml; did you mean name?"),
        ("- a\n- b\n", "must hold keys and values, got list"),
        ("name: [\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        small("--config", str(tmp_path / "a.yaml"))
    with pytest.raises(FileNotFoundError, match="there is no config file nowhere"):
        small("--config", "nowhere.yaml")


def test_messages_are_plain() -> None:
    assert nearest("trian.seed", ["train.seed", "data.train"]) == "did you mean train.seed?"
    keys = ["train", "train.learning_rate", "model.dtype", "model.audio.encoder", "model.image.encoder"]
    assert nearest("train.lr", keys) == "did you mean train.learning_rate?"
    assert nearest("lr", keys) == "did you mean train.learning_rate?"
    assert nearest("model.image.vision_tower", keys) == "did you mean model.image.encoder?"
    assert nearest("model.audio.vision_tower", keys) == "did you mean model.audio.encoder?"


def test_what_others_call_an_option_names_ours_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    from mllm.cli import parse

    with pytest.raises(ValueError, match=r"unknown option --train.lr; did you mean train.learning_rate\?"):
        parse(["train", "--train.lr", "1"])
    with pytest.raises(ValueError, match=r"unknown option --beam_size; did you mean num_beams\?"):
        parse(["evaluate", "--beam_size", "4"])
    (tmp_path / "a.yaml").write_text("train: {lr: 1}\n")
    with pytest.raises(ValueError, match=r"unknown key train.lr in .*; did you mean train.learning_rate\?"):
        parse(["train", "--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("verb", "word", "meant"),
    [
        ("train", "image_encoder", "model.image.encoder"),
        ("train", "vision_tower", "model.image.encoder"),
        ("train", "audio_encoder", "model.audio.encoder"),
        ("train", "video_encoder", "model.video.encoder"),
        ("train", "lora_r", "model.adapter.rank"),
        ("train", "model.lora_alpha", "model.adapter.alpha"),
        ("train", "lora_dropout", "model.adapter.dropout"),
        ("train", "target_modules", "model.adapter.targets"),
        ("train", "model.audio.encoder.adapter.lora_r", "model.audio.encoder.adapter.rank"),
        ("generate", "prompt", "text"),
        ("bench", "question", "text"),
        ("evaluate", "prompt", "reader.prompts"),
    ],
)
def test_another_name_is_answered_with_the_option_that_is_meant(verb: str, word: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown option --{re.escape(word)}; did you mean {re.escape(meant)}\?"):
        parse([verb, f"--{word}", "1"])


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (("generate", "--audio=a.wav", "--overlap_seconds=0.2"), "it goes with long_audio chunk"),
        (
            ("evaluate", "--manifest=a.jsonl", "--budgets=audio=/4", "--window_seconds=2"),
            "it goes with long_audio chunk",
        ),
        (("bench", "--budgets=nonsense"), "nonsense"),
    ],
)
def test_settings_are_checked_where_asserts_are_left_out(verb: tuple[str, ...], message: str) -> None:
    code = f"from mllm.cli import parse; parse({[*verb, '--model=m']})"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"ValueError: .*{message}", done.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["data"], "there is no command 'data'; did you mean data check or data balance or data import?"),
        (["synthetic", "pretrian"], "did you mean synthetic pretrain?"),
        (["qqqqqq"], "there are train, generate, chat, evaluate"),
        (["generate", "--model", "x"], "nothing to answer"),
        (["generate", "--model", "nowhere", "--text", "a"], "nowhere holds no model"),
        (["evaluate", "--model", "x", "--manifest", "none.jsonl", "--budgets", "image=1"], "none.jsonl: No such file"),
    ],
)
def test_what_a_user_did_wrong_is_one_line_and_code_2(words: list[str], message: str, capsys) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("mllm: ")
    assert message in error
    assert error.count("\n") == 1


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        main(["generate", "--model", "nowhere", "--text", "a", "--debug"])


def test_every_command_says_in_a_sentence_what_it_does() -> None:
    lines = usage().splitlines()
    commands = lines[lines.index("commands:") + 1 : lines.index("", lines.index("commands:"))]
    assert len(commands) == len(VERBS)
    for line, verb in zip(commands, VERBS, strict=True):
        name, _, sentence = line.strip().partition("  ")
        assert name == verb
        assert re.fullmatch(r"[A-Z].* .*[^.]\.", sentence.strip())


def test_help_of_everything_is_quick_and_loads_nothing_heavy() -> None:
    code = f"""
import sys, time
from mllm.cli import main
for words in [["--help"], *[[*verb.split(), "--help", *group] for verb in {list(VERBS)} for group in ([], ["all"])]]:
    try:
        assert main(words) == 0, words
    except SystemExit as end:
        assert not end.code, words
heavy = [name for name in ("torch", "transformers", "peft", "accelerate", "av", "matplotlib") if name in sys.modules]
sys.stderr.write(f"{{heavy}} {{time.process_time():.2f}}")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy, seconds = run.stderr.rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 10  # for all of them together, on a busy machine; one takes a third of a second
    for word in ("usage: mllm COMMAND", "data check", "Names a run folder, a checkpoint in one", "--train.max_steps"):
        assert word in run.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--text", "why?"],
        ["evaluate", "--manifest", "a.jsonl", "--budgets", "image=1"],
        ["lmms-eval", "--tasks", "pope", "--budgets", "image=1"],
        ["bench"],
        ["serve"],
    ],
    ids=lambda words: words[0],
)
def test_commands_on_a_model_all_say_in_the_same_options_which_and_how_it_is_loaded(words: list[str]) -> None:
    words = [*words, "--model", "runs/x", "--checkpoint", "5", "--sources.llm", "/models/llm", "--dtype", "bfloat16"]
    _, settings = parse([*words, "--limits.audio_seconds", "9", "--merge-adapter", "--use-cpu"])
    assert without_extras(ModelOptions, settings) == ModelOptions(
        model="runs/x",
        checkpoint="5",
        sources={"llm": "/models/llm"},
        limits=MediaLimits(audio_seconds=9),
        merge_adapter=True,
        dtype="bfloat16",
        use_cpu=True,
    )


def test_the_same_settings_come_from_the_command_line_and_from_code() -> None:
    words = ["data", "check", "train.jsonl", "--root", "media", "--open"]
    _, settings = parse(words)
    assert (settings.manifest, settings.root, settings.open) == ("train.jsonl", "media", True)
    words = [
        "evaluate",
        "--model",
        "m",
        "--manifest",
        "a.jsonl",
        "--manifest",
        "b.jsonl",
        "--budgets",
        "image=1;image=2",
    ]
    _, settings = parse(words)
    assert settings.manifest == ["a.jsonl", "b.jsonl"]
    assert [str(budget) for budget in settings.parsed_budgets] == ["image=1", "image=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, real media, a manifest with a file that is none, and an mp4 that has audio."""
    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.model.trainables import set_trainables

    made = tmp_path_factory.mktemp("cli")
    model, processor = build(tiny.settings_on(tiny.write_parts(made / "parts")))
    set_trainables(model)
    save_run(model, processor, made / "run")
    samples = []
    for number in range(3):
        names = tiny.write_media(made / "media", seed=number)
        parts = (Media("image", names["image"]), Text("what colour is the circle?"))
        messages = (Message("user", parts), Message("assistant", (Text("red"),)))
        samples.append(Sample(f"p{number}", messages, "vqa", "colour"))
    write_manifest(made / "media" / "good.jsonl", samples)
    (made / "media" / "bad.png").write_bytes(b"no image")
    bad = (Message("user", (Media("image", "bad.png"), Text("what?"))), samples[0].messages[1])
    write_manifest(made / "media" / "bad.jsonl", [*samples, Sample("bad", bad, "vqa", "colour")])
    return made


def test_generate_answers_about_files_and_tells_what_it_used(folder: Path, capsys) -> None:
    media, words = folder / "media", ["--model", str(folder / "run"), "--max-new-tokens", "5"]
    files = ["--image", str(media / "0.png"), "--image", str(media / "1.png"), "--audio", str(media / "0.wav")]
    files += ["--video", str(media / "0.mp4")]
    budget = "image=4,audio=/8,video=/5"
    assert main(["generate", *words, *files, "--text", "what is it?", "--budget", budget, "--timing"]) == 0
    shown = capsys.readouterr()
    assert "soft tokens: image 8, audio 5, video 4; prompt " in shown.err
    assert "milliseconds: encoder " in shown.err
    assert shown.out.endswith("\n")
    assert main(["generate", *words, *files, "--text", "what is it?", "--budget", budget, "--num-beams", "2"]) == 0
    assert main(["generate", *words, "--image", str(media / "0.png"), "--budget", "image=5"]) == 0
    assert "image 5 (this budget was not trained)" in capsys.readouterr().err


def test_ways_of_answering_faster_change_no_answer(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["generate", "--model", str(folder / "run"), "--image", str(folder / "media" / "0.png")]
    words += ["--max-new-tokens", "6", "--budget", "image=16"]
    shown = []
    for faster in ([], ["--static-cache"], ["--merge-adapter"]):
        assert main([*words, *faster]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].strip()
    assert shown == [shown[0]] * 3
    assert main([*words, "--static-cache", "--num-beams", "2"]) == 2
    assert "static_cache is true with num_beams 2" in capsys.readouterr().err
    sweep = ["evaluate", "--model", str(folder / "run"), "--use-cpu", "--max-new-tokens", "3"]
    sweep += ["--manifest", str(folder / "media" / "good.jsonl"), "--budgets", "image=1;image=16"]
    answers = []
    for number, faster in enumerate(([], ["--max-rows", "1"], ["--constant-prompt", "--merge-adapter"])):
        assert main([*sweep, "--out", str(tmp_path / str(number)), *faster]) == 0
        lines = [json.loads(line) for line in (tmp_path / str(number) / "hypotheses.jsonl").read_text().splitlines()]
        answers.append({(line["id"], line["budget"]): line["hypothesis"] for line in lines})
    assert answers == [answers[0]] * 3
    assert main([*sweep, "--out", str(tmp_path / "both"), "--constant-prompt", "--static-cache"]) == 2
    assert "static_cache goes neither with num_beams above 1 nor with constant_prompt" in capsys.readouterr().err
    assert main([*sweep, "--out", str(tmp_path / "none"), "--max-rows", "0"]) == 2
    assert "max_rows is 0; it must be at least 1" in capsys.readouterr().err


def test_generate_answers_several_questions_about_one_image(folder: Path, capsys) -> None:
    words = ["generate", "--model", str(folder / "run"), "--image", str(folder / "media" / "0.png")]
    words += ["--max-new-tokens", "6", "--budget", "image=16"]
    texts = ["what is it?", "what colour?", "[how] many: objects, and which?"]
    assert main([*words, *(word for text in texts for word in ("--text", text)), "--timing"]) == 0
    shown = capsys.readouterr()
    alone = []
    for text in texts:
        assert main([*words, "--text", text]) == 0
        alone.append(" ".join(capsys.readouterr().out.split()))
    assert shown.out.splitlines() == alone
    assert shown.err.count("soft tokens: image 16; prompt ") == 3
    assert shown.err.count(" of them shared)") == 3
    assert "milliseconds of all 3 together: encoder " in shown.err


def test_the_audio_of_a_video_is_heard_when_the_budget_names_audio(folder: Path, capsys) -> None:
    import av

    path = folder / "media" / "talk.mp4"
    samples = np.random.default_rng(0).normal(0, 0.1, 12_800).astype(np.float32)
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16_000, layout="mono")
        video.width, video.height, video.pix_fmt = 48, 48, "yuv420p"  # type: ignore[union-attr]
        for number in range(20):
            image = np.full((48, 48, 3), 10 * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))  # type: ignore[union-attr]
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0  # without a time the coder's delay would be heard as audio
        container.mux(audio.encode(frame))  # type: ignore[union-attr]
        container.mux([*video.encode(), *audio.encode()])  # type: ignore[union-attr]
    words = ["generate", "--model", str(folder / "run"), "--video", str(path), "--max-new-tokens", "2"]
    assert main([*words, "--budget", "audio=/4,video=/2"]) == 0
    # AAC comes in blocks of 1024 samples, so the audio is a little longer than what was written.
    assert re.search(r"soft tokens: audio 1[0-2], video 10;", capsys.readouterr().err)
    assert main([*words, "--budget", "video=/2"]) == 0
    assert "soft tokens: video 10;" in capsys.readouterr().err
    silent = ["generate", "--model", str(folder / "run"), "--video", str(folder / "media" / "0.mp4")]
    assert main([*silent, "--budget", "audio=/4,video=/2"]) == 2
    assert "no audio stream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "{}/bad.png", "--text", "what?"], "bad.png: "),
        (["--image", "{}/absent.png", "--text", "what?"], "(missing)"),
        (["--image", "{}/0.png", "--budget", "image=65"], "allowed are counts 1..64"),
        (["--image", "{}/0.png", "--budget", "audio=/4"], "names audio, but the request holds none"),
        (["--video", "{}/0.mp4", "--budget", "video=/3"], "serves only: /2, /5 (trained)"),
    ],
)
def test_generate_refuses_in_one_line(folder: Path, words: list[str], message: str, capsys) -> None:
    words = [word.format(folder / "media") for word in words]
    assert main(["generate", "--model", str(folder / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_evaluate_writes_everything_and_its_code_tells_of_failures(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["evaluate", "--model", str(folder / "run"), "--use-cpu", "--max-new-tokens", "3"]
    good = [*words, "--manifest", str(folder / "media" / "good.jsonl"), "--out", str(tmp_path / "good")]
    assert main([*good, "--budgets", "image=1;image=16"]) == 0
    assert "image=16" in capsys.readouterr().out
    files = {file.name for file in (tmp_path / "good").iterdir()}
    assert files == {"answers", "fingerprint.json", "hypotheses.jsonl", "results.json", "results.csv", "pareto.png"}
    results = json.loads((tmp_path / "good" / "results.json").read_text())
    assert [(row["budget"], row["num_samples"]) for row in results["rows"]] == [("image=16", 3), ("image=1", 3)]
    bad = [*words, "--manifest", str(folder / "media" / "bad.jsonl"), "--out", str(tmp_path / "bad")]
    assert main([*bad, "--budgets", "image=1"]) == 1
    shown = capsys.readouterr()
    assert "3 (1 failed)" in shown.out
    assert "failed: bad bad at image=1: " in shown.err
    assert main([*good, "--budgets", "image=1", "--num-beams", "2"]) == 2
    assert "num_beams was 1 and is 2" in capsys.readouterr().err


def test_export_gives_the_same_answer(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", "--model", str(folder / "run"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    words = ["--image", str(folder / "media" / "2.png"), "--text", "what is it?", "--max-new-tokens", "6"]
    answers = []
    for model in (folder / "run", tmp_path / "out"):
        assert main(["generate", "--model", str(model), *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_export_of_one_task_answers_as_the_bank_does_for_it(tmp_path: Path, capsys) -> None:
    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.config.model import LoraBankConfig
    from mllm.model.trainables import set_trainables

    config = tiny.settings_on(tiny.write_parts(tmp_path / "parts"), ("audio", "video"))
    model, processor = build(dataclasses.replace(config, adapter=LoraBankConfig(variant="st", rank=4)))
    set_trainables(model)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    save_run(model, processor, tmp_path / "run")
    names = tiny.write_media(tmp_path)
    words = ["--audio", str(tmp_path / names["audio"]), "--budget", "audio=/4", "--max-new-tokens", "8"]
    answers = []
    for name, task in (("run", None), ("asr", "asr"), ("vsr", "vsr")):
        if task is not None:
            export = ["export", "--model", str(tmp_path / "run"), "--out", str(tmp_path / name), "--task", task]
            assert main(export) == 0
        capsys.readouterr()
        assert main(["generate", "--model", str(tmp_path / name), *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    assert main(["export", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "none"), "--task", "sing"]) == 2
    assert "sing" in capsys.readouterr().err


def test_data_check_lists_problems_with_lines(folder: Path, capsys) -> None:
    media = folder / "media"
    assert main(["data", "check", str(media / "good.jsonl"), "--open"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["data", "check", str(media / "bad.jsonl"), "--root", str(media)]) == 0
    assert main(["data", "check", str(media / "bad.jsonl"), "--root", str(media), "--open"]) == 1
    assert "bad.jsonl:4: " in capsys.readouterr().out
    assert main(["data", "check", str(media / "absent.jsonl")]) == 2


def test_the_doctor_shows_states_and_repairs(capsys) -> None:
    from mllm.commands.doctor import show

    findings = [
        Finding("torch", "ok", "2.14.1", True),
        Finding("torchaudio", "broken", "2.11.0, but OSError: libc10_cuda.so", False, "pip install torchaudio==2.11.0"),
    ]
    show(Report({"python": "3.11"}, findings))
    shown = capsys.readouterr().out
    for words in (
        "python      3.11",
        "torchaudio (optional)",
        "to repair torchaudio: pip install torchaudio==2.11.0",
    ):
        assert words in shown
    assert shown.rstrip().endswith("everything required works, in tested releases")


def test_audio_files_of_another_rate_are_heard(folder: Path, capsys) -> None:
    soundfile.write(folder / "media" / "cd.wav", np.zeros((35_280, 2), np.float32) + 0.01, 44_100)
    words = ["generate", "--model", str(folder / "run"), "--audio", str(folder / "media" / "cd.wav")]
    assert main([*words, "--max-new-tokens", "2"]) == 0
    assert "soft tokens: audio 10;" in capsys.readouterr().err
