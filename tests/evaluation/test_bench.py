"""The measurement of budgets: same work for each, every repeat kept, made-up media or files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from blocks import medium

from mllm.budget import Budget
from mllm.cli import main
from mllm.evaluation.bench import bench, budget_cost, default_budgets, made_up_media, quartiles, requests
from mllm.evaluation.flops import Item, request_cost
from mllm.inference.answerer import Decoding
from mllm.processing.batch import num_prompt_tokens


def test_every_budget_decodes_equally_long_in_turn_and_costs_what_the_model_says() -> None:
    config = tiny.settings(("image", "audio"))
    model, processor = tiny.model(config), tiny.processor(config)
    batch = requests(processor, made_up_media(processor, ["image"], 0.8), None, 2)
    budgets = [Budget.parse(text) for text in ("image=64", "image=4", "image=1")]
    seen: list[int] = []
    results = bench(
        model,
        processor,
        dict.fromkeys(budgets, batch),
        decoding=Decoding(max_new_tokens=5),
        repeats=3,
        warmup=1,
        progress=lambda done, total: seen.append(done),
    )
    assert seen == list(range(1, 13))
    assert [one.answer.tokens["image"] for one in results] == [64, 4, 1]
    for one in results:
        facts = one.facts()
        assert (facts["new_tokens"], len(facts["total_ms"]["repeats"])) == (5, 3)
        assert facts["total_ms"]["median"] > 0
        assert facts["kv_bytes"] > 0
        assert facts["peak_bytes"] is None
        assert facts["total_ms"]["low"] <= facts["total_ms"]["median"] <= facts["total_ms"]["high"]
    flops = [one.facts()["total_flops"] for one in results]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == 3
    assert model.generation_config.eos_token_id is not None
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_tiles_and_frames_are_costed_one_by_one_as_an_evaluation_costs_them() -> None:
    """The same images as one-tile items: every encoded one counts, and what is not shown is not compressed."""
    image = tiny.settings(("image",), image={"tiling": {"kind": "pinpoints"}})
    frames = medium("video", {"encoder": {"kind": "frames", "count": 4}, "budgets": [16, 4]})
    config = replace(image, video=frames)
    model, processor = tiny.model(config), tiny.processor(config)
    plain = request_cost(model.config, [Item("image", 64, 16)], num_prompt_tokens=9, num_new_tokens=3)
    for name, budget, num_encoded, num_shown in (("image", "image=16", 5, 5), ("video", "video=16,frames=2", 4, 2)):
        batch = requests(processor, made_up_media(processor, [name], 1.0), None, 1)
        cost = budget_cost(model, processor, batch, Budget.parse(budget), num_new_tokens=3)
        assert cost is not None
        assert (cost.encoder, cost.compressor) == (num_encoded * plain.encoder, num_shown * plain.compressor)
        (result,) = bench(
            model, processor, {Budget.parse(budget): batch}, decoding=Decoding(max_new_tokens=3), repeats=1, warmup=0
        )
        assert result.cost == cost
        row = batch.rows[0]
        assert result.answer.num_prompt_tokens == num_prompt_tokens(
            row, row.token_counts(Budget.parse(budget), processor.space)
        )


def test_budgets_left_out_are_the_trained_ones_with_both_ends() -> None:
    many = tiny.processor(tiny.settings(("image",), image={"budgets": list(range(1, 65))}))
    chosen = [str(budget) for budget in default_budgets(many, ["image"])]
    assert (len(chosen), chosen[0], chosen[-1]) == (8, "image=64", "image=1")
    few = tiny.processor(tiny.settings())
    assert len(default_budgets(few, ["audio", "video"])) == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder and an image."""
    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.model.trainables import set_trainables

    folder = tmp_path_factory.mktemp("bench")
    model, processor = build(tiny.settings_on(tiny.write_parts(folder / "parts")))
    set_trainables(model)
    save_run(model, processor, folder / "run")
    tiny.write_media(folder)
    return folder


def test_the_command_shows_and_writes(run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # the times of a busy machine are long, and would break the names in two
    words = ["bench", "--model", str(run / "run"), "--use-cpu", "--repeats", "2", "--new-tokens", "3"]
    assert main([*words, "--budgets", "image=16;image=2", "--out", str(tmp_path / "out"), "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "image=16" in shown
    assert "image=2 (untrained)" in shown
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["tokens"] for row in written["budgets"]] == [{"image": 16}, {"image": 2}]
    assert written["facts"]["batch_size"] == 2
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1_000
    clips = ["--seconds", "0.8", "--media", "audio", "--media", "video", "--num-beams", "2"]
    assert main([*words, *clips]) == 0
    assert "audio=/8,video=/5" in capsys.readouterr().out
    assert main([*words, "--image", str(run / "0.png"), "--text", "what?"]) == 0
    assert "image=64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "repeats is 0; it must be at least 1"),
        (["--budgets", "image=many"], "many"),
        (["--budgets", "image=65"], "allowed are counts 1..64"),
        (["--media", "audio", "--image", "a.png"], "leave one of them out"),
        (["--media", "audio"], "the encoder's window is 1 seconds"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Path, words: list[str], message: str, capsys) -> None:
    assert main(["bench", "--model", str(run / "run"), "--use-cpu", *words]) == 2
    assert message in capsys.readouterr().err
