"""Whatever takes a model takes one on a host, with budgets that pool and budgets that resize, or says why not."""

import io
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny_hosts
import torch
from toy_server import part, server, user

import mllm
from mllm.budget import Budget
from mllm.checkpoints.adoption import host_inputs
from mllm.checkpoints.export import export
from mllm.checkpoints.load import save_run
from mllm.cli import main
from mllm.evaluation.answer_store import AnswerStore
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.chat import ChatSession
from mllm.inference.request_list import AnsweredRequest, answer_requests, read_request_list
from mllm.lmms.answering import BudgetedAnswers, Request, read_budget
from mllm.lmms.conversation import read_generation
from mllm.model.trainables import set_trainables

BUDGETS = ("image=9", "image=1", "image<=9", "image=1,image<=9")
TOKENS = [45, 5, 9, 1]
"""Of an image of 100 x 60 pixels, which is seen as 2 x 2 tiles and the whole, or as the whole alone."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a model on an Idefics3, whose adapter does something."""
    folder = tmp_path_factory.mktemp("surfaces")
    host = tiny_hosts.write("idefics3", folder / "host")
    model, processor = tiny_hosts.adopted(host, "idefics3")
    set_trainables(model)
    save_run(model, processor, folder / "toy")
    tiny_hosts.image(100, 60).save(folder / "0.png")
    return folder / "toy"


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    """Answers as all others should."""
    return Answerer(*mllm.load(run), Decoding(max_new_tokens=5))


def test_an_exported_model_answers_alike(run: Path, answerer: Answerer, tmp_path: Path) -> None:
    export(run, tmp_path / "exported")
    exported = Answerer(*mllm.load(tmp_path / "exported"), Decoding(max_new_tokens=5))
    for budget, tokens in zip(BUDGETS, TOKENS, strict=True):
        ours, theirs = (one("what?", image=run.parent / "0.png", budget=budget) for one in (answerer, exported))
        assert (ours.text, ours.tokens) == (theirs.text, {"image": tokens})


def test_the_command_line_evaluates_and_measures(run: Path, answerer: Answerer, tmp_path: Path) -> None:
    parts = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    manifest = run.parent / "test.jsonl"
    manifest.write_text(json.dumps({"id": "a", "task": "vqa", "messages": messages}) + "\n")
    listed, out = ";".join(BUDGETS), tmp_path / "evaluated"
    words = ["evaluate", "--model", str(run), "--manifest", str(manifest), "--budgets", listed, "--out", str(out)]
    assert main([*words, "--max_new_tokens", "5"]) == 0
    lines = {key.budget: line for key, line in AnswerStore(out).read().items()}
    assert [lines[budget]["tokens"]["image"] for budget in BUDGETS] == TOKENS
    expected = [answerer("what?", image=run.parent / "0.png", budget=budget).text for budget in BUDGETS]
    assert [lines[budget]["hypothesis"] for budget in BUDGETS] == expected
    # Of what is encoded, not of what is shown: pooling leaves it as it is, a smaller image does not.
    encoder = [lines[budget]["cost"]["encoder"] for budget in BUDGETS]
    assert encoder[0] == encoder[1] == 5 * encoder[2] == 5 * encoder[3]
    words = ["bench", "--model", str(run), "--image", str(run.parent / "0.png"), "--budgets", listed]
    assert main([*words, "--repeats", "1", "--warmup", "0", "--new_tokens", "2", "--out", str(tmp_path / "bench")]) == 0
    measured = json.loads((tmp_path / "bench" / "bench.json").read_text())["budgets"]
    assert [one["tokens"]["image"] for one in measured] == TOKENS


def test_a_chat_and_a_list_see_an_image_at_the_resolution_of_each_question(
    run: Path, answerer: Answerer, tmp_path: Path
) -> None:
    chat = ChatSession(answerer, remembers=False)
    chat.add("image", str(run.parent / "0.png"))
    lines = [{"image": str(run.parent / "0.png"), "text": "what?", "budget": budget} for budget in BUDGETS]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    listed = list(answer_requests(answerer, read_request_list(tmp_path / "list.jsonl"), Budget()))
    for budget, tokens, line in zip(BUDGETS, TOKENS, listed, strict=True):
        alone = answerer.answer("what?", image=str(run.parent / "0.png"), budget=budget)
        chat.set_budget(budget)
        assert (alone.tokens, chat.ask("what?").text) == ({"image": tokens}, alone.text)
        assert isinstance(line, AnsweredRequest)
        assert (line.answer.tokens, line.answer.text) == ({"image": tokens}, alone.text)


def test_lmms_eval_asks_it_as_any_other(run: Path, answerer: Answerer) -> None:
    path = str(run.parent / "0.png")
    turn = {"role": "user", "content": [{"type": "image", "url": path}, {"type": "text", "text": "what?"}]}
    request = Request("doc", read_generation({"max_new_tokens": 5}), lambda: [turn])
    budgets = [read_budget(text.replace(",", "+"), answerer.processor) for text in BUDGETS]
    (answers,) = BudgetedAnswers(answerer.model, answerer.processor, budgets)([request], lambda _: None)
    for budget, answer, tokens in zip(BUDGETS, answers, TOKENS, strict=True):
        alone = answerer("what?", image=path, budget=budget)
        assert (answer.text, answer.tokens, str(answer.budget)) == (alone.text, {"image": tokens}, budget)


def test_what_does_not_go_with_a_host_says_so(run: Path, answerer: Answerer) -> None:
    with pytest.raises(ValueError, match=r"^model\.host pools its soft tokens, and a session is about those that grow"):
        answerer.begin(image=run.parent / "0.png", budget="image=9")
    with pytest.raises(
        ValueError, match=r"image<=8 cannot be met: an image of 100 x 60 pixels takes at least 9 tokens"
    ):
        answerer("what?", image=run.parent / "0.png", budget="image<=8")


@pytest.mark.slow
def test_a_server_takes_both_kinds_of_budgets_and_keeps_them_apart(run: Path, answerer: Answerer) -> None:
    file = io.BytesIO()
    tiny_hosts.image(100, 60).save(file, "PNG")
    words = ["--requests.max_new_tokens", "5", "--max_budget", "image<=45", "--measure_budgets", "false"]
    with server(run, *words) as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60)
        for budget, tokens in zip(BUDGETS, TOKENS, strict=True):  # one image: what was encoded for one is not another's
            for _ in range(2):
                answer = client.chat.completions.create(
                    model="toy",
                    messages=user(part("image", file.getvalue()), "what?"),  # type: ignore[arg-type]
                    extra_body={"budget": budget},
                )
                assert answer.choices[0].message.content == answerer("what?", image=file.getvalue(), budget=budget).text
                assert answer.usage.prompt_tokens_details.model_dump(exclude_none=True) == {"image_tokens": tokens}
        with pytest.raises(openai.BadRequestError, match="image<=8 cannot be met"):
            client.chat.completions.create(
                model="toy",
                messages=user(part("image", file.getvalue()), "what?"),  # type: ignore[arg-type]
                extra_body={"budget": "image<=8"},
            )


def test_training_at_points_sees_images_smaller(run: Path, tmp_path: Path) -> None:
    lines = []
    for number in range(4):
        tiny_hosts.image(100, 60, seed=number).save(tmp_path / f"{number}.png")
        parts = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "what?"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
        lines.append(json.dumps({"id": str(number), "task": "vqa", "messages": messages}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    config: dict[str, Any] = {
        "model": {
            "host": str(run.parent / "host"),
            "image": {"budgets": [9, 4, 1]},
            "adapter": {"kind": "gated_lora", "rank": 4, "alpha": 8},
        },
        "data": {"train": [str(tmp_path / "train.jsonl")], "num_workers": 0, "max_rows": 4},
        "sampler": {"mode": "points", "points": ["image=4", "image=4,image<=9", "image<=9"]},
        "train": {
            **{"out": str(tmp_path / "run"), "max_steps": 3, "learning_rate": 0.01, "log_every": 1, "use_cpu": True},
            **{"progress": False, "tensorboard": False},
        },
    }
    mllm.train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    model, processor = mllm.load(tmp_path / "run")
    raw = tiny_hosts.image(100, 60, seed=9)
    original = tiny_hosts.load(str(run.parent / "host"), "idefics3", torch.float32)
    smaller = processor.host.resizing.keywords(24)
    with torch.no_grad():
        expected = original(**host_inputs(processor, raw, original, images_kwargs=smaller)).logits
        assert torch.equal(model(**tiny_hosts.inputs(processor, [raw], "image<=9")).logits, expected)
    sandwich = {"mode": "sandwich", "distill_weight": 1.0, "max_image_tokens": [9]}
    mllm.train({**config, "sampler": sandwich, "train": {**config["train"], "out": str(tmp_path / "sandwich")}})
    rows = [json.loads(line) for line in (tmp_path / "sandwich" / "log.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "loss" in row]) == 3
    config["sampler"]["points"] = ["image=4", "tiles<=2"]
    with pytest.raises(ValueError, match=r"^sampler\.points: tiles<=2: this model does not cut images into tiles$"):
        mllm.train({**config, "train": {**config["train"], "out": str(tmp_path / "other")}})
