"""A run with the hybrid compressor from the command line: it trains, is loaded again and answers at any count."""

from pathlib import Path

import pytest
import tiny

from mllm.checkpoints.load import load
from mllm.cli import main
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest


def test_a_run_learns_and_answers_at_any_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, media = tiny.write_parts(tmp_path / "parts"), tiny.write_media(tmp_path / "media")
    user_turn = Message("user", (Media("image", media["image"]), Text("what is it?")))
    rows = [Sample(f"row{n}", (user_turn, Message("assistant", (Text("red"),))), task="vqa") for n in range(4)]
    write_manifest(tmp_path / "media/train.jsonl", rows)
    words = ["--model.llm", parts["llm"], "--model.chat_format", "plain", "--model.image.encoder", parts["image"]]
    words += ["--model.image.compressor", "hybrid", "--model.image.budgets", "[64, 20, 16, 4]"]
    words += ["--sampler.mode", "all", "--data.train", str(tmp_path / "media/train.jsonl"), "--data.num_workers", "0"]
    words += ["--train.use_cpu", "true", "--train.out"]
    started, learned = tmp_path / "started", tmp_path / "learned"
    assert main(["train", *words, str(started), "--train.max_steps", "1", "--train.learning_rate", "1e-30"]) == 0
    assert main(["train", *words, str(learned), "--train.max_steps", "3"]) == 0
    before, after = (load(run)[0].model.compressors["image"].state_dict() for run in (started, learned))
    assert before["query"].shape == (48, 16)
    assert all((before[name] != value).any() for name, value in after.items())
    assert (before["query"] != after["query"]).any(dim=1).all()
    question = ["--image", str(tmp_path / "media" / media["image"]), "--text", "what is it?", "--max-new-tokens", "2"]
    for count in (1, 37, 64):
        assert main(["generate", "--model", str(learned), "--budget", f"image={count}", *question, "--use-cpu"]) == 0
    assert main(["generate", "--model", str(learned), "--budget", "image=65", *question, "--use-cpu"]) != 0
    assert "allowed are counts 1..64" in "".join(capsys.readouterr())
