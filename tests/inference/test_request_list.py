"""A list is answered in its order as each line would be alone; a bad line is told by its number and costs no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.cli import main
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.request_list import AnsweredRequest, answer_requests, read_request_list
from mllm.model.trainables import set_trainables

BAD = {
    2: ({"text": "why?", "picture": "0.png"}, "unknown key picture; "),
    4: ({"id": 7, "image": "nowhere.png", "text": "what?"}, "nowhere.png: "),
    5: ({"image": "0.png", "text": "what?", "budget": "image=65"}, "image=65"),
    6: ({"image": "0.png", "text": "what?", "budget": "audio=/4"}, "the request holds none"),
    8: ("{", "not JSON"),
    9: ({"budget": "image=1"}, "nothing to answer"),
    10: ([1], "a request is an object with id, text, image"),
}
GOOD: dict[int, dict[str, Any]] = {
    1: {"image": "0.png", "text": "what is it?", "budget": "image=16"},
    3: {"id": "third", "image": ["0.png", "1.png"], "text": "and now?"},
    7: {"audio": "0.wav"},
    11: {"image": "0.png", "text": "what is it?", "budget": "image=4"},
    12: {"text": "only words"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny model of random weights, and a list beside real media."""
    folder = tmp_path_factory.mktemp("list")
    model, processor = build(tiny.settings_on(tiny.write_parts(folder / "parts")))
    set_trainables(model)
    save_run(model, processor, folder / "run")
    for seed in (0, 1):
        tiny.write_media(folder / "media", seed=seed)
    lines = {**GOOD, **{number: line for number, (line, _) in BAD.items()}}
    texts = [lines[number] if isinstance(lines[number], str) else json.dumps(lines[number]) for number in range(1, 13)]
    (folder / "media" / "list.jsonl").write_text("\n".join(texts) + "\n")  # type: ignore[arg-type]
    return folder / "run"


def test_a_list_is_answered_in_its_order_as_each_line_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = run.parent / "media"
    words = ["generate", "--model", str(run), "--inputs", str(media / "list.jsonl"), "--max-new-tokens", "6"]
    assert main([*words, "--budget", "image=1", "--batch_size", "3"]) == 1
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 13))
    for number, (_, reason) in BAD.items():
        assert reason in rows[number - 1]["error"]
        assert f"line {number}: " in shown.err
    assert "answered 5 of 12 requests" in shown.err
    answerer = Answerer(*load(run), Decoding(max_new_tokens=6))
    for number, line in GOOD.items():
        files: dict[str, Any] = {
            medium: [str(media / name) for name in ([line[medium]] if isinstance(line[medium], str) else line[medium])]
            for medium in ("image", "audio")
            if medium in line
        }
        alone = answerer.answer(
            line.get("text"), **files, budget=line.get("budget", "image=1" if "image" in line else "")
        )
        assert rows[number - 1]["answer"] == alone.text
        assert rows[number - 1]["tokens"] == dict(alone.tokens)
    assert rows[2]["id"] == "third"
    assert rows[3]["id"] == "7"


def test_requests_of_a_batch_that_hold_the_same_file_encode_it_once(run: Path) -> None:
    answerer = Answerer(*load(run), Decoding(max_new_tokens=2))
    shapes = []
    encoder = answerer.model.model.vision_tower
    handle = encoder.register_forward_hook(lambda _, inputs, __: shapes.append(len(inputs[0])))
    listed = read_request_list(run.parent / "media" / "list.jsonl")
    same = [line for line in listed if line.line_number in (1, 11)]
    answers = list(answer_requests(answerer, same, Budget()))
    handle.remove()
    assert shapes == [1]
    assert [one.answer.tokens["image"] for one in answers if isinstance(one, AnsweredRequest)] == [16, 4]


def test_a_line_that_wants_a_router_where_there_is_none_costs_only_itself(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"image": "0.png", "text": "what?", "budget": budget} for budget in ("auto", "image=4")]
    (run.parent / "media" / "auto.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = ["--inputs", str(run.parent / "media" / "auto.jsonl"), "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(run), *words]) == 1
    refused, answered = map(json.loads, capsys.readouterr().out.splitlines())
    assert "'auto' needs a router" in refused["error"]
    assert answered["tokens"] == {"image": 4}
    assert main(["generate", "--model", str(run), *words, "--budget", "auto"]) == 2  # all of them want it
    assert "auto needs a router: mllm router fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inputs", "LIST", "--text", "what?"], "--inputs brings its own questions and files; leave out --text"),
        (["--inputs", "LIST", "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--text", "what?", "--batch_size", "2"], "it goes with --inputs"),
        (["--inputs", "EMPTY"], "holds no request"),
        (["--inputs", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    ],
)
def test_what_does_not_go_with_a_list_is_refused(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "empty.jsonl").write_text("\n")
    names = {"LIST": str(run.parent / "media" / "list.jsonl"), "EMPTY": str(run.parent / "empty.jsonl")}
    assert main(["generate", "--model", str(run), *[names.get(word, word) for word in words]]) == 2
    assert message in capsys.readouterr().err


def test_a_default_budget_for_a_medium_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    config = tiny.settings(("image",))
    answerer = Answerer(tiny.model(config), tiny.processor(config))
    (tmp_path / "list.jsonl").write_text('{"text": "what?"}\n')
    with pytest.raises(ValueError, match=r"names audio, which this model does not take; it takes image"):
        list(answer_requests(answerer, read_request_list(tmp_path / "list.jsonl"), Budget.parse("audio=/4")))
