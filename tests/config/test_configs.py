"""Every shipped run config is read, and its model is built at real size on the meta device."""

import json
from pathlib import Path

import pytest
import yaml
from published_parts import ROOT, build_on_meta, read

from mllm.budget.sampler import BudgetSampler
from mllm.model.trainables import NEW_TOKENS, set_trainables

RUNS = [*sorted(path for path in (ROOT / "configs").glob("*.yaml") if "\nmodel:" in path.read_text())]
RUNS.append(ROOT / "mllm" / "synthetic" / "demo" / "demo.yaml")
# Millions of parameters that train. Omni-AVSR S, T and ST publish 38.29, 51.92 and 58.74. A bank holds every scale
# (4 pairs of rates), MoME all of its 24 experts per layer; the projectors of MTSK are 25.19. M3 and MQT train Vicuna-7B
# whole (6.74 billion) and a projector of 20.98, or a query transformer of 8.92.
TRAINABLE_MILLIONS = {
    "demo": None,
    "frozen_llm_lora": 319.82 + 20.98,
    "frozen_llm_mome": 308.19 + 20.98,
    "llama_avsr": None,
    "m3": 6738.42 + 20.98,
    "m3_lora": 319.82 + 20.98,
    "m3_next_anyres": 6738.42 + 20.98 + 290.91,  # CLIP too, up to the layer that is read, and one newline
    "mome_attention": 14.13 + 25.19,
    "mome_ffn": 14.13 + 25.19,
    "mome_layer": 14.13 + 25.19,
    "mqt_stage1": 8.92,
    "mqt_stage2": 6738.42 + 8.92,
    "mtsk_ms": 6.82 + 25.19,
    "mtsk_mss": 5 * 6.82 + 25.19,
    "mtsk_ss": 4 * 6.82 + 25.19,
    "omni_s": 38.29,
    "omni_st": 58.74,
    "omni_t": 51.92,
}


def test_every_config_is_here() -> None:
    assert [path.stem for path in RUNS] == [
        *("frozen_llm_lora", "frozen_llm_mome", "llama_avsr", "m3", "m3_lora", "m3_next_anyres"),
        *("mome_attention", "mome_ffn"),
        *("mome_layer", "mqt_stage1", "mqt_stage2", "mtsk_ms", "mtsk_mss", "mtsk_ss", "omni_s", "omni_st", "omni_t"),
        "demo",
    ]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_model_of_a_config_builds_at_real_size(path: Path) -> None:
    settings = read(path)
    model = build_on_meta(settings.model)
    names = set_trainables(model, settings.parts)
    has_marks = path.stem.startswith(("llama_avsr", "mome", "mtsk", "omni"))
    assert (NEW_TOKENS in names) == has_marks
    if has_marks:
        assert model.get_parameter(NEW_TOKENS).shape == (4, model.config.text_config.hidden_size)
    assert all(parameter.is_meta for parameter in model.parameters())
    millions = sum(p.numel() for n, p in model.named_parameters() if n in set(names)) / 1e6
    if (expected := TRAINABLE_MILLIONS[path.stem]) is not None:
        assert millions == pytest.approx(expected, abs=0.02)
    sampler = BudgetSampler(
        model.config.space,
        settings.sampler.mode,
        num_budgets=settings.sampler.num_budgets,
        points=settings.sampler.budgets,
    )
    assert sampler(0)


def test_launcher_configs_are_read() -> None:
    files = sorted((ROOT / "configs").glob("accelerate_*.yaml"))
    assert [path.stem for path in files] == [
        *("accelerate_ddp", "accelerate_fsdp2", "accelerate_multinode", "accelerate_zero2", "accelerate_zero3")
    ]
    for path in files:
        values = yaml.safe_load(path.read_text())
        assert values["num_processes"] >= 2
        if "deepspeed_config" in values:
            assert (ROOT / values["deepspeed_config"]["deepspeed_config_file"]).is_file()
    for stage in (2, 3):
        values = json.loads((ROOT / "configs" / f"zero{stage}.json").read_text())
        assert values["zero_optimization"]["stage"] == stage


def test_the_first_stage_of_mqt_trains_the_published_query_transformer() -> None:
    settings = read(ROOT / "configs" / "mqt_stage1.yaml")
    model = build_on_meta(settings.model)
    names = set(set_trainables(model, settings.parts))
    assert sum(p.numel() for n, p in model.named_parameters() if n in names) == 8_923_136
    assert BudgetSampler(model.config.space, "all")(0)[0].budget.amounts["image"].value == 256
    second = build_on_meta(read(ROOT / "configs" / "mqt_stage2.yaml").model)
    shapes = {name: value.shape for name, value in second.named_parameters()}
    assert all(shapes[name] == value.shape for name, value in model.named_parameters() if name in names)
    assert len(second.config.space.media["image"].trained) == 128


def test_m3_can_train_its_encoder_as_the_paper_says() -> None:
    settings = read(ROOT / "configs" / "m3.yaml")
    model = build_on_meta(settings.model)
    both, alone = (len(set_trainables(model, (*settings.parts, *more))) for more in (("image",), ()))
    assert both > alone
    counts = [amount.value for amount in model.config.space.media["image"].trained]
    assert counts == [576, 144, 36, 9, 1]
    assert len(BudgetSampler(model.config.space, "all")(0)) == 5


@pytest.mark.parametrize("name", ["mqt_stage1", "mqt_stage2", "m3", "m3_lora", "frozen_llm_lora", "frozen_llm_mome"])
def test_a_step_of_eight_processes_holds_the_published_number_of_images(name: str) -> None:
    settings = read(ROOT / "configs" / f"{name}.yaml")
    data, train = settings.data, settings.train
    assert data.max_rows * train.accumulation * 8 == (256 if name == "mqt_stage1" else 128)
    assert data.max_rows * (data.max_sample_tokens or 0) == data.tokens_per_batch  # so that rows decide, not tokens
    assert train.count_warmup_steps(5198) == 156
