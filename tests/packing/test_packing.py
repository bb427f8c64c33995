"""One packed pass against one plain pass per row and budget: the same loss, gradients and reports."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen3Config,
)

from mllm.budget import Budget
from mllm.budget.sampler import SampledBudget
from mllm.config.model import AdapterConfig, LoraBankConfig, LoraConfig, ModelConfig, MomeConfig
from mllm.model.expert_losses import auxiliary_weights
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.packing.attention import enable_packing, obstacle
from mllm.processing.batch import Batch
from mllm.processing.processor import LoadedMedia
from mllm.training.loss import ChunkedTargetLoss, Loss
from mllm.training.step import (
    BudgetView,
    Teacher,
    TrainingBatch,
    _views,
    expand_views,
    fixed_views,
    forward,
    frozen_features,
    make_training_batch,
    num_targets,
    pack_views,
    split_by_budget,
    tokens_of_views,
    total_loss,
)

SYSTEM = "you are told what to do and you do just that"
SPEECH = {
    "audio": {"projector": {"per_budget": True}},
    "video": {"compressor": "pool", "projector": {"per_budget": True}},
}
NESTED = {"compressor": {"kind": "query", "num_queries": 64, "num_heads": 2}, "budgets": [2, 4, 8, 16, 24, 36, 48, 64]}
SCALES = [f"audio=/{a},video=/{v}" for a in (4, 8) for v in (2, 5)]
QUERIES = {
    "compressor": {"kind": "query", "num_queries": 4, "window_frames": 8, "num_heads": 2},
    "budgets": ["/2", "/4", "/8"],
}


def image(seed: int) -> LoadedMedia:
    return tiny.random_media("image", seed=seed)


def random_audio(seed: int) -> LoadedMedia:
    return tiny.random_media("audio", 20 + 3 * seed, seed=seed)


def lips(seed: int) -> LoadedMedia:
    return tiny.random_media("video", 21 + 2 * seed, seed=seed)


def m3() -> tuple[ModelConfig, list, list[str]]:
    """Images behind a system prompt, at all scales; pooled behind the projector."""
    config = tiny.settings(("image",), image={"projector": {"before_pooling": True}, "budgets": [64, 16, 4, 1]})
    rows = [([SYSTEM, image(i), f"question {i}"], answer) for i, answer in enumerate(["red", "two circles", "no"])]
    return config, rows, [f"image={n}" for n in (64, 16, 4, 1)]


def mqt() -> tuple[ModelConfig, list, list[str]]:
    """Eight nested budgets; the second row shows two images."""
    config = tiny.settings(("image",), image=NESTED)
    rows = [([SYSTEM, image(0), "what is it"], "a cat"), ([image(1), "and", image(2), "which"], "the first one")]
    return config, rows, [f"image={n}" for n in NESTED["budgets"]]


def haar() -> tuple[ModelConfig, list, list[str]]:
    """A pooled pyramid in the order that nests."""
    config = tiny.settings(("image",), image={"compressor": {"order": "haar"}, "budgets": [64, 16, 4]})
    return config, m3()[1], ["image=64", "image=16", "image=4"]


def mtsk() -> tuple[ModelConfig, list, list[str]]:
    """Audio and lips at every pair of rates; what follows the audio differs."""
    config = tiny.settings(("audio", "video"), **SPEECH)
    rows = [([SYSTEM, random_audio(i), lips(i), "say it"], answer) for i, answer in enumerate(["hello there", "yes"])]
    return config, rows, SCALES


def streams() -> tuple[ModelConfig, list, list[str]]:
    """Queries in windows, of which budgets share the first ones of the first window."""
    config = tiny.settings(("audio",), audio=QUERIES)
    return (
        config,
        [([SYSTEM, random_audio(4), "say it"], "hello"), ([random_audio(2), "say it"], "no")],
        ["audio=/2", "audio=/4"],
    )


def stacked() -> tuple[ModelConfig, list, list[str]]:
    """Stacked frames, images and text alone in one batch."""
    rows = [([lips(0), "say"], "yes"), ([SYSTEM, image(0), "what"], "red"), ([SYSTEM, "hello"], "hello")]
    return tiny.settings(("image", "video")), rows, ["image=16,video=/2", "image=4,video=/5"]


def omni() -> tuple[ModelConfig, list, list[str]]:
    """Two clips in three tasks each, behind their media the same question."""
    config = tiny.settings(("audio", "video"), **SPEECH)
    rows = []
    for i, answer in enumerate(["hello there", "yes"]):
        clip = random_audio(i), lips(i)
        rows += [([*media, "say it"], answer) for media in (clip[:1], clip[1:], clip)]
    return config, rows, SCALES


CASES = {"m3": m3, "mqt": mqt, "haar": haar, "mtsk": mtsk, "omni": omni, "streams": streams, "stacked": stacked}


def build(config: ModelConfig, **text: Any) -> ElasticForConditionalGeneration:
    model = tiny.model(config, **text)
    set_trainables(model)
    enable_packing(model.model.language_model)
    return model.train()


def plain(model: ElasticForConditionalGeneration, batch: Batch, views: Sequence[BudgetView], processor: Any) -> Tensor:
    """The loss by one ordinary forward pass per row and budget; gradients are left in the model."""
    total = torch.zeros(())
    weights = auxiliary_weights(model.config)
    for view in views:
        row = batch.rows[view.row]
        expanded = processor.expand(Batch([row], batch.values), [[view.budget]], left_padding=False)
        inputs = dict(expanded.inputs)
        for medium in batch.media:  # the items of other rows are encoded too, and not shown
            shown = [span.item for span in row.spans if span.extent.medium == medium]
            if shown and f"{medium}_index" not in inputs:
                first, count = shown[0], len(inputs[f"num_{medium}_tokens"])
                items = shown if len(shown) == count else [*range(first, first + count)]
                inputs[f"{medium}_index"] = torch.tensor(items)
        out = model(**inputs)
        labels = expanded.labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].mT, labels, reduction="sum", ignore_index=-100)
        count = int((labels != -100).sum())
        extra = sum(weights[name] * value.sum() for name, value in (out.auxiliary or {}).items())
        loss = view.weight * (losses + count * extra) / num_targets(batch.rows)
        loss.backward()
        total += loss.detach()
    return total


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    of_parameters = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return of_parameters


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor], *, rel: float = 1e-5) -> None:
    largest = max(value.norm() for value in expected.values())
    for name, value in gradients.items():
        # A projector of a budget that was not drawn has no gradient in a plain pass, and a zero one here.
        wanted = expected.get(name, torch.zeros_like(value))
        # What is 0 in exact arithmetic, such as a bias of all keys of a softmax, is rounding in both.
        is_zero = wanted.norm() < 1e-6 * largest
        assert (value.norm() < 1e-6 * largest) if is_zero else (value - wanted).norm() <= rel * wanted.norm(), name
    assert not set(expected) - set(gradients)


def run(model: Any, training_batch: TrainingBatch, targets: int, **options: Any) -> tuple[Loss, Any]:
    """Forward and loss without a trainer."""
    target_loss = ChunkedTargetLoss(
        training_batch.targets, targets, vocabulary_size=model.config.get_text_config().vocab_size
    )
    outputs = forward(model, training_batch, target_loss, device=torch.device("cpu"), **options)
    return total_loss(outputs, training_batch, config=model.config, num_targets=targets), outputs


def packed(
    model: ElasticForConditionalGeneration, batch: Batch, views: Sequence[BudgetView], processor: Any
) -> tuple[Loss, Any]:
    training_batch = make_training_batch(batch, views, processor, packed=True)
    assert training_batch.plan is not None
    assert training_batch.inputs["input_ids"].shape == (1, training_batch.plan.num_tokens)
    loss, outputs = run(model, training_batch, num_targets(batch.rows))
    loss.total.backward()
    return loss, outputs


def compare(config: ModelConfig, rows: list, budgets: list[str], **text: Any) -> tuple[Any, Any, list[BudgetView]]:
    model, processor = build(config, **text), tiny.processor(config)
    batch = tiny.batch(processor, rows, for_training=True)
    views = fixed_views(batch.rows, [Budget.parse(budget) for budget in budgets])
    expected = plain(model, batch, views, processor)
    wanted = gradients(model)
    loss, _ = packed(model, batch, views, processor)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), wanted)
    return model, (processor, batch, wanted), views


@pytest.mark.parametrize("name", list(CASES))
def test_loss_and_every_gradient_are_those_of_one_pass_per_row_and_budget(name: str) -> None:
    config, rows, budgets = CASES[name]()
    model, (processor, batch, wanted), views = compare(config, rows, budgets)
    if name in ("mqt", "haar"):  # everything is taken from one run per image
        training_batch = make_training_batch(batch, views, processor, packed=True)
        assert training_batch.inputs["num_image_tokens"].tolist() == [64] * len(batch.values["pixel_values"])
    if name == "omni":  # every clip is encoded once, and audio is read once per rate for two tasks
        assert [len(batch.values[f"{medium}_values"]) for medium in ("audio", "video")] == [2, 2]
        plan = make_training_batch(batch, views, processor, packed=True).plan
        assert plan is not None
        shared = int((plan.rows >= 0).sum()) - plan.num_tokens
        assert shared >= 2 * 5, "soft tokens of the shorter audio at /4"
    # The same, one group of views after the other, on features that are encoded once.
    features = frozen_features(model, batch, torch.device("cpu"))
    assert set(features) == batch.media
    for num_tokens in (None, tokens_of_views(batch.rows, views, processor.space)):
        model.zero_grad()
        first = None
        for group in split_by_budget(views, num_tokens):
            training_batch = pack_views(
                expand_views(batch, group, processor), group, processor, packed=True, teacher=first
            )
            loss, outputs = run(model, training_batch, num_targets(batch.rows), features=features)
            first = first or Teacher(training_batch.starts, outputs.target_states)
            loss.total.backward()
        assert_same(gradients(model), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        LoraBankConfig(variant="mss", rank=4, alpha=8, scales=SCALES),
        MomeConfig(num_experts=5, top_k=2, bottleneck=4, balance_weight=0.5),
        MomeConfig(num_experts=4, top_k=1, bottleneck=4, disjoint_routers=True, scales=SCALES, placement="layer"),
    ],
    ids=["bank", "mome", "disjoint"],
)
def test_adapters_that_know_their_rows_know_them_in_a_pack(adapter: AdapterConfig, checkpointing: bool) -> None:
    config, rows, budgets = mtsk()
    config = dataclasses.replace(config, adapter=adapter)
    model, processor = build(config), tiny.processor(config)
    if checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = tiny.batch(processor, rows, for_training=True)
    views = fixed_views(batch.rows, [Budget.parse(budget) for budget in budgets])
    expected = plain(model, batch, views, processor)
    wanted = gradients(model)
    loss, outputs = packed(model, batch, views, processor)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), wanted)
    training_batch = make_training_batch(batch, views, processor, packed=True)
    is_shared = training_batch.plan.num_tokens < sum(int((row >= 0).sum()) for row in training_batch.plan.rows)
    assert is_shared
    if outputs.expert_usage is not None:
        _, padded = run(model, make_training_batch(batch, views, processor), 9)
        assert padded.expert_usage is not None
        assert torch.equal(outputs.expert_usage, padded.expert_usage)


def test_tasks_that_share_a_clip_share_its_encoding_and_what_they_begin_with() -> None:
    """As Omni-AVSR trains: three tasks of one clip at one pair of rates, with a member for each task."""
    clip, seen = random_audio(3), lips(3)
    for adapter in (LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"]),):
        config = dataclasses.replace(tiny.settings(("audio", "video"), **SPEECH), adapter=adapter)
        rows = [([clip, "say it"], "yes it is"), ([seen, "say it"], "yes it is"), ([clip, seen, "say it"], "yes it is")]
        model, processor = build(config), tiny.processor(config)
        batch = tiny.batch(processor, rows, for_training=True)
        both = [dataclasses.replace(span, item=0) for span in batch.rows[2].spans]
        of_task = [(both[0],), (both[1],), tuple(both)]
        shared = [dataclasses.replace(row, spans=runs) for row, runs in zip(batch.rows, of_task, strict=True)]
        batch = Batch(shared, {key: value[:1] for key, value in batch.values.items()})
        views = fixed_views(batch.rows, [Budget.parse("audio=/4,video=/2")])
        expected = plain(model, batch, views, processor)
        wanted = gradients(model)
        assert packed(model, batch, views, processor)[0].total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same(gradients(model), wanted)
        training_batch = make_training_batch(batch, views, processor, packed=True)
        assert training_batch.inputs["num_audio_tokens"].tolist() == [training_batch.inputs["num_audio_tokens"][0]]


def test_mixtures_of_projectors_report_by_row() -> None:
    config = tiny.settings(("audio", "video"), audio={"projector": {"kind": "moe", "num_experts": 3, "z_weight": 0.5}})
    compare(config, mtsk()[1], SCALES)


@pytest.mark.parametrize(
    "image",
    [
        {"tiling": {"kind": "pinpoints"}, "budgets": [16, 4, 1]},
        {**NESTED, "budgets": [16, 4], "tiling": {"kind": "free", "max_tiles": 4, "merge": "flat"}},
    ],
    ids=["one map", "flat"],
)
def test_images_in_tiles_are_packed_with_their_newlines(image: dict[str, Any]) -> None:
    config = tiny.settings(("image",), image=image)
    processor = tiny.processor(config)
    rng = np.random.default_rng(0)  # even images would leave gradients that are nothing but rounding
    sizes = ((90, 130, 3), (60, 200, 3))
    cuts = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    rows = [([SYSTEM, processor.transform("image", cut), "what"], "red") for cut in cuts]
    model, (_, batch, _), views = compare(config, rows, ["image=16", "image=4"])
    if model.model.newline is not None:
        plan = make_training_batch(batch, views, processor, packed=True).plan
        assert plan is not None
        assert (plan.layouts["image"][:, 0] < 0).any()


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, MistralConfig])
def test_other_decoders_read_packed_rows(config: type[LlamaConfig]) -> None:
    text = config(
        **{**tiny.llm_config().to_dict(), "model_type": config.model_type, "sliding_window": None, "head_dim": 8}
    )
    llm = AutoModelForCausalLM.from_config(text).eval()
    enable_packing(llm.model)
    from mllm.packing.attention import packed_mask
    from mllm.packing.plan import plan_rows

    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 1], [5, 2, 3]]
    plan = plan_rows(rows, least_shared=1)
    ids = torch.tensor(
        [[rows[row][column] for row, column in zip(plan.source_rows, plan.position_ids[0], strict=True)]]
    )
    mask = packed_mask(plan, ids.device, "sdpa")
    out = llm.model(ids, attention_mask=mask, position_ids=plan.position_ids, segment_plan=plan, use_cache=False)
    for row, places in zip(rows, plan.rows, strict=True):
        alone = llm.model(torch.tensor([row]), use_cache=False).last_hidden_state
        torch.testing.assert_close(out.last_hidden_state[:, places[: len(row)]], alone, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_packed_is_refused_with_the_reason() -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**small)).model
    with pytest.raises(ValueError, match="layers of full_attention, sliding_attention"):
        enable_packing(gemma)
    mistral = AutoModelForCausalLM.from_config(MistralConfig(**small, sliding_window=8)).model
    assert "within a window of 8" in str(obstacle(mistral))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**small, "layer_types": ["full_attention"] * 2, "rope_parameters": rope, "pad_token_id": 0}
    qwen_vl = Qwen2_5_VLTextModel(Qwen2_5_VLConfig(text_config=text).text_config)
    assert "has positions of three dimensions" in str(obstacle(qwen_vl))
    config, rows, budgets = m3()
    model, processor = tiny.model(config), tiny.processor(config)
    batch = tiny.batch(processor, rows, for_training=True)
    training_batch = make_training_batch(
        batch, fixed_views(batch.rows, [Budget.parse(budgets[0])]), processor, packed=True
    )
    with pytest.raises(ValueError, match="enable_packing"):
        model(**training_batch.inputs, plan=training_batch.plan)


def test_rows_that_are_not_packed_are_read_as_before() -> None:
    config, rows, budgets = m3()
    model, processor = tiny.model(config), tiny.processor(config)
    batch = tiny.batch(processor, rows, for_training=True)
    training_batch = make_training_batch(batch, fixed_views(batch.rows, [Budget.parse(budgets[1])]), processor)
    with torch.no_grad():
        before = model(**training_batch.inputs).logits
        enable_packing(model.model.language_model)
        assert torch.equal(model(**training_batch.inputs).logits, before)


def test_groups_hold_one_budget_of_every_row_and_learn_from_the_first() -> None:
    largest, smallest = Budget.parse("image=64"), Budget.parse("image=1")
    views = _views([[SampledBudget(largest, is_teacher=True), SampledBudget(smallest)], [SampledBudget(Budget())]])
    groups = split_by_budget(views)
    assert [[(view.row, view.name, view.teacher) for view in group] for group in groups] == [
        [(0, "image=64", 0), (1, "text", 1)],
        [(0, "image=1", 0)],
    ]


def test_small_groups_are_one_where_they_have_no_more_tokens_than_the_largest() -> None:
    budgets = [Budget.parse(f"image={count}") for count in (64, 16, 36, 4, 1)]
    views = _views([[SampledBudget(budget) for budget in budgets]])

    def names(num_tokens: list[int]) -> list[list[str]]:
        groups = split_by_budget(views, num_tokens)
        assert all(view.teacher == 0 for group in groups for view in group)
        return [[view.name for view in group] for group in groups]

    assert names([74, 26, 46, 14, 11]) == [["image=64"], ["image=36", "image=16"], ["image=4", "image=1"]]
    assert names([97, 20, 40, 8, 5]) == [["image=64"], ["image=36", "image=16", "image=4", "image=1"]]
    assert names([10, 10, 10, 10, 10]) == [[f"image={count}"] for count in (64, 16, 36, 4, 1)]
    assert names([10, 5, 30, 9, 20]) == [["image=64", "image=1"], ["image=36"], ["image=4", "image=16"]]
