"""Ids come from what a row holds and costs, and reach its experts whatever stands beside it in the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from blocks import space

from mllm.adapters.expert_ids import ExpertNames, scales_of
from mllm.adapters.lora_bank import LoraBank
from mllm.budget import Budget, TokenCount
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import TRAINABLES, load, save_run
from mllm.config.model import LoraBankConfig, ModelConfig
from mllm.config.reading import read
from mllm.model.trainables import set_trainables

SPEECH = ("audio", "video")
SCALES = ["audio=/4", "audio=/8", "video=/2", "video=/5", "audio=/4,video=/2", "audio=/8,video=/5"]
ROWS = [
    ([tiny.random_media("audio", 37), tiny.random_media("video", 19), "transcribe speech and video to text."], "now"),
    ([tiny.random_media("audio", 37), tiny.random_media("video", 19), "transcribe speech and video to text."], "now"),
    ([tiny.random_media("audio", 24, seed=3), "transcribe speech to text."], "place"),
    ([tiny.random_media("video", 21, seed=4), "transcribe video to text."], "blue"),
    (["how many objects?"], "two"),
]
BUDGETS = [Budget.parse(text) for text in ("audio=/4,video=/2", "audio=/8,video=/5", "audio=/8", "video=/5", "")]
SCALE_IDS, TASK_IDS = [4, 5, 1, 3, -1], [2, 2, 0, 1, -1]


def settings(variant: str, scales: list[str] | None = None, config: ModelConfig | None = None) -> ModelConfig:
    adapter = LoraBankConfig(variant=variant, rank=3, alpha=6, scales=scales or [])  # pyright: ignore
    return replace(config or tiny.settings(SPEECH), adapter=adapter)


VARIANTS = {"mss": SCALES, "st": None, "ms": None}


@pytest.fixture(scope="module", params=list(VARIANTS))
def made(request: pytest.FixtureRequest):
    config = settings(request.param, VARIANTS[request.param])
    return tiny.model(config), tiny.processor(config)


def test_ids_say_what_a_row_holds_and_costs() -> None:
    config = settings("mss", SCALES)
    inputs = (
        tiny.processor(config).expand(tiny.batch(tiny.processor(config), ROWS), [BUDGETS], left_padding=False).inputs
    )
    assert inputs["scale_ids"].tolist() == SCALE_IDS
    assert "task_ids" not in inputs
    config = settings("t")
    inputs = (
        tiny.processor(config).expand(tiny.batch(tiny.processor(config), ROWS), [BUDGETS], left_padding=False).inputs
    )
    assert inputs["task_ids"].tolist() == TASK_IDS
    assert "scale_ids" not in inputs


@pytest.mark.parametrize("left_padding", [True, False])
@torch.no_grad()
def test_rows_at_different_budgets_in_one_batch_equal_the_rows_alone(made, left_padding: bool) -> None:
    model, processor = made
    inputs = processor.expand(tiny.batch(processor, ROWS), [BUDGETS], left_padding=left_padding).inputs
    mask = inputs["attention_mask"]
    together = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for index, (row, budget) in enumerate(zip(ROWS, BUDGETS, strict=True)):
        alone = model(**processor.expand(tiny.batch(processor, [row]), [[budget]], left_padding=False).inputs).logits
        torch.testing.assert_close(together[index][mask[index].bool()], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_batched_generation_equals_single(made, options: dict) -> None:
    model, processor = made

    def generate(rows, budgets) -> list[list[int]]:
        inputs = processor.expand(tiny.batch(processor, rows), [budgets], left_padding=True).inputs
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, disable_compile=True, **options)
        end = processor.tokenizer.eos_token_id
        answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [answer[: answer.index(end)] if end in answer else answer for answer in answers]

    number = options.get("num_return_sequences", 1)
    together = generate(ROWS, BUDGETS)
    for index, (row, budget) in enumerate(zip(ROWS, BUDGETS, strict=True)):
        assert together[index * number : (index + 1) * number] == generate([row], [budget])


def test_a_rate_without_an_expert_is_refused_with_those_trained() -> None:
    config = settings("ss", SCALES)
    processor = tiny.processor(config)
    batch = tiny.batch(processor, ROWS[2:3])
    with pytest.raises(
        ValueError, match=r"sample 'row0': .* no expert for the scale audio=/5; trained are audio=/4 \|"
    ):
        processor.expand(batch, [[Budget.parse("audio=/5")]], left_padding=False)
    processor = tiny.processor(settings("ss"))
    with pytest.raises(ValueError, match=r"no expert for the scale audio=/4; trained are audio=/4,video=/2 \|"):
        processor.expand(batch, [[Budget.parse("audio=/4")]], left_padding=False)


def test_the_task_of_a_sample_comes_before_the_media_it_holds() -> None:
    experts = ExpertNames(tasks=("translate", "asr"))
    assert experts.task_id("translate", ["audio"]) == 0
    assert experts.task_id("anything", ["audio"]) == 1
    assert experts.task_id("anything", []) == -1
    with pytest.raises(ValueError, match="no expert for the task avsr; trained are translate, asr"):
        experts.task_id("anything", ["video", "audio"])
    with pytest.raises(ValueError, match="audio has both /4 and /8"):
        ExpertNames(scales=("audio=/4",)).scale_id([("audio", TokenCount(2, 4)), ("audio", TokenCount(1, 8))])


def test_scales_are_points_of_the_space_and_few() -> None:
    speech = space(audio={"budgets": ["/4", "/16"]}, video={"budgets": ["/2", "/5"]})
    assert scales_of([], speech) == [f"audio=/{a},video=/{v}" for a in (4, 16) for v in (2, 5)]
    with pytest.raises(ValueError, match=r"adapter.scales holds 'audio=/5', which is not a point"):
        scales_of(["audio=/5"], speech)
    many = space(image={"compressor": {"kind": "query", "num_queries": 99}, "budgets": list(range(1, 100))})
    with pytest.raises(ValueError, match=r"model.adapter.scales would be 99 experts"):
        scales_of([], many)


def test_a_key_of_another_kind_is_refused() -> None:
    def model(**adapter: object) -> ModelConfig:
        return read(ModelConfig, {"llm": "none", "adapter": adapter}, "model")

    with pytest.raises(
        ValueError, match=r"model.adapter.variant goes with kind lora_bank, not with lora, which takes rank"
    ):
        model(variant="ms")
    with pytest.raises(ValueError, match=r"model.adapter.dropout goes with kind lora, not with lora_bank"):
        model(kind="lora_bank", variant="ms", dropout=0.1)
    with pytest.raises(ValueError, match=r"model.adapter.variant is missing"):
        model(kind="lora_bank")
    with pytest.raises(ValueError, match=r"model.adapter.scales is .* but variant ms has experts of shared alone"):
        tiny.config(settings("ms", SCALES))


def test_ids_for_an_adapter_that_has_no_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="scale_ids and task_ids go with lora_bank or gated_lora or mome, not lora"):
        tiny.model(tiny.settings(SPEECH))(input_ids=torch.tensor([[3, 4]]), scale_ids=torch.tensor([0]))


def test_a_run_is_loaded_bit_for_bit_and_exported_per_task(tmp_path: Path) -> None:
    config = settings("st", config=tiny.settings_on(tiny.write_parts(tmp_path / "parts"), SPEECH))
    model, processor = build(config)
    names = set_trainables(model)
    assert [n for n in names if "lora" in n] == sorted(
        f"model.language_model.layers.{layer}.self_attn.{target}.lora_{side}"
        for layer in (0, 1) for target in ("q_proj", "v_proj") for side in "AB"
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_run(model, processor, tmp_path / "run")
    assert (tmp_path / "run" / TRAINABLES).is_file()

    def logits(model, processor, rows: list[int]) -> torch.Tensor:
        batch = tiny.batch(processor, [ROWS[row] for row in rows])
        inputs = processor.expand(batch, [[BUDGETS[row] for row in rows]], left_padding=False).inputs
        with torch.no_grad():
            return model(**inputs).logits

    loaded = load(tmp_path / "run")
    assert torch.equal(logits(*loaded, [0, 2, 3]), logits(model, processor, [0, 2, 3]))
    for task, row in (("avsr", 0), ("asr", 2), ("vsr", 3)):
        export(tmp_path / "run", tmp_path / task, task=task)
        exported = load(tmp_path / task)
        assert not any(isinstance(part, LoraBank) for part in exported[0].modules())
        torch.testing.assert_close(logits(*exported, [row]), logits(*loaded, [row]), rtol=1e-4, atol=1e-4)
    for wrong in (None, "ocr"):
        with pytest.raises(ValueError, match=rf"task is {wrong}; the adapter has experts for: asr \| vsr \| avsr"):
            export(tmp_path / "run", tmp_path / "no", task=wrong)
    with pytest.raises(ValueError, match="scale is audio=/4; the adapter has experts for: no scale"):
        export(tmp_path / "run", tmp_path / "no", task="asr", scale="audio=/4")
