"""A host is adopted, trained, saved, loaded, evaluated and asked like any other model, and stays itself at full."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tiny_hosts
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForImageTextToText

import mllm
from mllm.budget import Budget, Extent
from mllm.budget.sampler import BudgetSampler
from mllm.checkpoints import adoption
from mllm.checkpoints.export import export
from mllm.cli import main
from mllm.commands import adopt
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.media import Audio
from mllm.processing.batch import EncodedSample, MediaSpan
from mllm.training.step import sampled_views
from mllm.utils.markdown import markdown_table

FIXED = ("llava", "paligemma", "gemma3")
"""Families that see every image at one size."""
ANSWERS = ("red", "blue", "green")


def write_data(folder: Path, family: str, *, size: int = 12, answered: bool = True) -> Path:
    """A manifest over random media of one family's kind."""
    medium = tiny_hosts.HOSTS[family].medium
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(size):
        raw = tiny_hosts.medium(family, seed=100 + number)
        if medium == "image":
            name = f"{number}.png"
            raw.save(folder / name)
        else:
            name = f"{number}.wav"
            soundfile.write(folder / name, raw, 16_000)
        parts = [{"type": medium, "path": name}, {"type": "text", "text": "what is this?"}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        line = {"id": f"s{number}", "task": "vqa", "messages": messages}
        if answered:
            messages.append({"role": "assistant", "content": ANSWERS[number % 3]})
        else:
            line["meta"] = {"unanswered": True}
        lines.append(json.dumps(line))
    path = folder / ("answered.jsonl" if answered else "unanswered.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return path


def run_config(host: str, family: str, manifest: Path, out: Path, **changes: Any) -> dict[str, Any]:
    budgets = list(adoption.examine(host).budgets)
    config: dict[str, Any] = {
        "model": {
            "host": host,
            tiny_hosts.HOSTS[family].medium: {"budgets": budgets},
            "adapter": {"kind": "gated_lora", "rank": 8, "alpha": 16},
        },
        "data": {"train": [str(manifest)], "num_workers": 0, "max_rows": 4, **changes.pop("data", {})},
        "sampler": {"mode": "sandwich", "distill_weight": 1.0},
        "train": {
            **{"out": str(out), "max_steps": 4, "learning_rate": 0.01, "log_every": 1},
            **{"progress": False, "tensorboard": False, "use_cpu": True},
            **changes.pop("train", {}),
        },
    }
    return {**config, **changes}


def test_full_views_of_a_gated_model_teach_and_weigh_nothing(tmp_path: Path) -> None:
    host = tiny_hosts.write("llava", tmp_path)
    _, processor = tiny_hosts.adopted(host, "llava")
    sampler = BudgetSampler(processor.space, "sandwich", num_budgets=3)
    rows = [
        EncodedSample("image", [5, 6], [-100, 6], (MediaSpan(Extent("image", grid=(6, 6)), 0),)),
        EncodedSample("text", [5, 6], [-100, 6]),
    ]
    views = sampled_views(rows, sampler, 0, is_gated=True)
    of_image, of_text = ([view for view in views if view.row == number] for number in (0, 1))
    assert str(of_image[0].budget) == "image=36"
    assert [view.teacher for view in of_image] == [0] * len(of_image)
    assert of_image[0].weight == 0
    assert sum(view.weight for view in of_image) == pytest.approx(1)
    assert [view.weight for view in of_text] == [0]
    random = BudgetSampler(processor.space, "random", is_gated=True)
    assert {str(one.budget) for step in range(40) for one in random(step)} == {"image=9", "image=4", "image=1"}
    ungated = [view for view in sampled_views(rows, sampler, 0) if view.row == 0]
    assert ungated[0].weight > 0


def test_a_trained_run_is_loaded_whole_and_at_full_is_the_host(tmp_path: Path) -> None:
    host = tiny_hosts.write("llava", tmp_path / "host")
    manifest = write_data(tmp_path / "data", "llava")
    config_of_run = run_config(host, "llava", manifest, tmp_path / "run")
    mllm.train(config_of_run)
    model, processor = mllm.load(tmp_path / "run")
    assert any(parameter.any() for name, parameter in model.named_parameters() if ".lora_B" in name)
    original = tiny_hosts.load(host, "llava", torch.float32)
    raw = tiny_hosts.image(seed=7)
    with torch.no_grad():
        expected = original(**adoption.host_inputs(processor, raw, original)).logits
        assert torch.equal(model(**tiny_hosts.inputs(processor, [raw])).logits, expected)
    with pytest.raises(ValueError, match="is a model on a host, which is exported as it is; leave out scale"):
        export(tmp_path / "run", tmp_path / "exported", scale="image=4")
    export(tmp_path / "run", tmp_path / "exported")
    reduced = tiny_hosts.inputs(processor, [raw], "image=4")
    for exported in (mllm.load(tmp_path / "exported")[0], auto_model(tmp_path / "exported")):
        with torch.no_grad():
            assert torch.equal(exported(**tiny_hosts.inputs(processor, [raw])).logits, expected)
            assert torch.equal(exported(**reduced).logits, model(**reduced).logits)
    half, _ = mllm.load(tmp_path / "exported", dtype="bfloat16")
    kinds = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in half.named_parameters()}
    assert (kinds["lora_A"], kinds["lora_B"], kinds["weight"]) == (torch.float32, torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="merge_adapter is true, but an adapter of kind gated_lora"):
        mllm.load(tmp_path / "run", merge_adapter=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "text_config" not in config
    assert config["sources"]["host"]["reference"] == host
    assert len(config["sources"]["host"]["sha256"]) == 64
    (tmp_path / "host").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"--sources\.host"):
        mllm.load(tmp_path / "run")
    moved = {"host": str(tmp_path / "elsewhere")}
    again, _ = mllm.load(tmp_path / "run", sources=moved)
    with torch.no_grad():
        assert torch.equal(again(**tiny_hosts.inputs(processor, [raw])).logits, expected)
    longer = {**config_of_run, "train": {**config_of_run["train"], "max_steps": 6}}
    mllm.train(longer, resume="auto", sources=moved)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def auto_model(folder: Path) -> Any:
    mllm.register()
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_a_host_learns_from_its_own_answers_where_a_manifest_has_none(tmp_path: Path) -> None:
    host = tiny_hosts.write("llava", tmp_path / "host")
    manifest = write_data(tmp_path / "data", "llava", answered=False)
    refused = run_config(host, "llava", manifest, tmp_path / "none")
    with pytest.raises(ValueError, match="has no answer to learn from"):
        mllm.train(refused)
    data = {"host_answer_tokens": 5}
    mllm.train(run_config(host, "llava", manifest, tmp_path / "run", data=data))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[list[str]]]:
    """Rows of the table in docs/adopt.md, shown when all families are through."""
    rows: list[list[str]] = []
    yield rows
    plugins = request.config.pluginmanager
    reporter, capture = (plugins.getplugin(name) for name in ("terminalreporter", "capturemanager"))
    if rows and reporter is not None and capture is not None:
        head = ["tiny random host", "budget", "before", "after", "another item"]
        with capture.global_and_fixture_disabled():
            reporter.write_line("\n" + markdown_table(head, rows, of_numbers=False))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in tiny_hosts.HOSTS if name not in tiny_hosts.MIXTURES])
def test_an_adopted_host_trains_as_its_config_stands_and_comes_closer_to_itself(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[list[str]]
) -> None:
    tiny_hosts.require(family)
    monkeypatch.chdir(tmp_path)
    host = tiny_hosts.write(family, tmp_path / "host")
    medium = tiny_hosts.HOSTS[family].medium
    manifest = write_data(tmp_path / "data", family, size=24)
    assert main(["adopt", host, "--out", "adopted.yaml", "--manifest", str(manifest)]) == 0
    with pytest.raises(ValueError, match="is there already"):
        adopt.run(adopt.Settings(model=host, out="adopted.yaml"))
    budgets = yaml.safe_load(Path("adopted.yaml").read_text())["model"][medium]["budgets"]
    words = ["train", "--config", "adopted.yaml", "--train.epochs", "null", "--train.max_steps", "50"]
    words += ["--train.learning_rate", "0.005", "--train.use_cpu", "--train.progress", "false"]
    untrained, processor = tiny_hosts.adopted(host, family, trained=False)
    asked = [f"{medium}={budget}" for budget in budgets[1:]]
    # Gemma 4's processor sees no image as smaller than the 70 tokens that the tiny host has by default.
    asked += [f"image<={least_tokens(processor)}"] if medium == "image" and family not in ("gemma4", *FIXED) else []
    before = divergences(untrained, processor, family, asked)
    assert main([*words, "--data.num_workers", "0"]) == 0
    model, processor = mllm.load("runs/adopted")
    after = divergences(model, processor, family, asked)
    control = divergences(model, processor, family, asked, shift=1)
    table += [[f"`{family}`", f"`{one}`", *(f"{by[one]:.3f}" for by in (before, after, control))] for one in asked]
    assert all(after[one] < before[one] for one in asked if "<=" not in one), (before, after)
    # What is seen smaller and shown whole is the host's own answer: no adapter, nothing that could change.
    assert all(after[one] == before[one] for one in asked if "<=" in one)
    original, raw = tiny_hosts.load(host, family, torch.float32), tiny_hosts.medium(family, seed=9)
    with torch.no_grad():
        expected = original(**adoption.host_inputs(processor, raw, original)).logits
        assert torch.equal(model(**tiny_hosts.inputs(processor, [raw])).logits, expected)
    export("runs/adopted", "exported")
    with torch.no_grad():
        for budget in ("", f"{medium}={budgets[-1]}"):
            inputs = tiny_hosts.inputs(processor, [raw], budget)
            assert torch.equal(auto_model(Path("exported"))(**inputs).logits, model(**inputs).logits)
    listed = ";".join([f"{medium}={budgets[0]}", *asked])
    words = ["evaluate", "--model", "runs/adopted", "--manifest", str(manifest), "--budgets", listed]
    assert main([*words, "--max_new_tokens", "4", "--limit", "4"]) == 0
    name = "0.png" if medium == "image" else "0.wav"
    words = ["generate", "--model", "runs/adopted", f"--{medium}", str(tmp_path / "data" / name), "--text", "what?"]
    assert main([*words, "--budget", f"{medium}={budgets[-1]}", "--max_new_tokens", "4"]) == 0


def least_tokens(processor: Any) -> int:
    """A number that images of this file can be seen at: of one tile, or of a map of as few as there are."""
    raw = tiny_hosts.image()
    return (
        9 if processor.host.tiling is None else processor.host.resizing.resolutions((raw.height, raw.width))[-1].tokens
    )


@torch.no_grad()
def divergences(model: Any, processor: Any, family: str, budgets: list[str], *, shift: int = 0) -> dict[str, float]:
    """KL of what is said at each budget from what the host says, over answers about media nothing was trained on.

    Args:
        shift: at reduced budgets, show the media of the row so many further on: what an answer can be without looking.
    """
    medium = processor.host.medium
    samples = [
        Sample(
            f"row{number}",
            (
                Message("user", (Media(medium, "x"), Text("what is this?"))),
                Message("assistant", (Text(ANSWERS[number % 3]),)),
            ),
            task="test",
        )
        for number in range(6)
    ]
    raws = [tiny_hosts.medium(family, seed=1000 + number) for number in range(6)]
    seen = [Budget.parse(budget) for budget in ["", *budgets]]
    wrapped = [raw if medium == "image" else Audio(raw, 16_000) for raw in raws]
    loaded = [[processor.transform(medium, raw, budgets=seen)] for raw in wrapped]

    def answers(budget: str, shift: int) -> torch.Tensor:
        batch = processor.batch(samples, [*loaded[shift:], *loaded[:shift]], for_training=True)
        expanded = processor.expand(batch, [[Budget.parse(budget)] * 6], left_padding=False)
        targets = expanded.targets()
        return model(**expanded.inputs, logit_positions=targets.positions).logits.log_softmax(-1)

    full = answers("", 0)
    return {
        budget: float(functional.kl_div(answers(budget, shift), full, log_target=True, reduction="batchmean"))
        for budget in budgets
    }
