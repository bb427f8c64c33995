"""MoME: what the paper's formula says, beside each block; a balance loss that is right under checkpointing too."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from blocks import adapter_of
from tiny_models import DECODERS, decoder, embeddings
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, Qwen3_5TextConfig

from mllm.adapters import adapters_disabled, build_adapter, merge_adapters
from mllm.adapters.adapter_inputs import AdapterInputs, Collector
from mllm.adapters.mome import Mome
from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import load, save_run
from mllm.model.trainables import set_trainables

MOME = {"kind": "mome", "num_experts": 5, "num_shared": 1, "top_k": 2, "bottleneck": 3}
BANK = {"kind": "lora_bank", "variant": "ms", "rank": 3, "alpha": 6, "targets": ["q_proj", "v_proj"]}
PLACEMENTS = ["attention", "ffn", "layer"]


def awake(module: nn.Module) -> nn.Module:
    """Up-projections are zero at first, so that an untouched adapter would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if ".mome." in f".{name}" and (name.endswith(("up", "up_bias", "down_bias"))):
            parameter.data.normal_(std=0.3, generator=generator)
    return module


def with_experts(config_class: type = LlamaConfig, placement: str = "layer", **changes) -> nn.Module:
    llm = decoder(config_class)
    build_adapter(llm, adapter_of({**MOME, "placement": placement, **changes}))
    return awake(llm)


def reference(mome: Mome, hidden: Tensor, router: int = 0) -> Tensor:
    """The paper's formula, token by token and expert by expert."""
    out = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        one = hidden[row]
        scores = functional.softmax(mome.router[router] @ one, dim=0)
        top = scores.topk(mome.top_k).indices.tolist()
        total = scores[top].sum() if mome.renormalise else 1.0
        gates = [1.0] * mome.num_shared + [scores[n] / total if n in top else 0.0 for n in range(mome.num_experts)]
        for expert, gate in enumerate(gates):
            inner = functional.gelu(mome.down[expert] @ one + mome.down_bias[expert])
            out[row] += gate * (mome.up[expert] @ inner + mome.up_bias[expert])
    return out


def experts(**changes) -> Mome:
    mome = Mome(8, **{"num_experts": 5, "num_shared": 2, "top_k": 2, "bottleneck": 3, **changes})
    for parameter in mome.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.dim()))
    return mome


@pytest.mark.parametrize("changes", [{}, {"renormalise": True}, {"num_shared": 0, "top_k": 5}])
@torch.no_grad()
def test_the_experts_compute_the_formula(changes: dict) -> None:
    mome, hidden = experts(**changes), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(mome(hidden).flatten(0, 1), reference(mome, hidden.flatten(0, 1)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_disjoint_routers_serve_their_scale_and_text_rows_only_the_shared_experts() -> None:
    mome, hidden = experts(num_routers=3), torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
    mome.inputs = AdapterInputs(scale_ids=torch.tensor([2, 0, -1]))
    out = mome(hidden)
    for row, router in ((0, 2), (1, 0)):
        torch.testing.assert_close(out[row], reference(mome, hidden[row], router), rtol=1e-4, atol=1e-4)
    shared = experts(num_routers=3)
    shared.up[2:] = 0
    shared.up_bias[2:] = 0
    torch.testing.assert_close(out[2], reference(shared, hidden[2]), rtol=1e-4, atol=1e-4)
    mome.inputs = AdapterInputs()
    with pytest.raises(ValueError, match="a router per scale, but scale_ids were not given"):
        mome(hidden)


@pytest.mark.parametrize("config_class", [*DECODERS, Qwen3_5TextConfig])
@torch.no_grad()
def test_layer_placement_adds_to_the_output_of_a_layer_what_its_normalised_input_gives(config_class) -> None:
    llm, frozen, embeds = with_experts(config_class), decoder(config_class), embeddings()
    seen: dict[str, Tensor] = {}
    layer, plain = llm.layers[0], frozen.layers[0]
    layer.register_forward_hook(lambda _, __, out: seen.update(adapted=out))
    plain.register_forward_hook(lambda _, __, out: seen.update(frozen=out))
    plain.input_layernorm.register_forward_hook(lambda _, __, out: seen.update(normalised=out))
    llm(inputs_embeds=embeds)
    frozen(inputs_embeds=embeds)
    torch.testing.assert_close(seen["adapted"], seen["frozen"] + layer.mome(seen["normalised"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config_class", "placement", "block"),
    [
        (LlamaConfig, "attention", "self_attn"),
        (LlamaConfig, "ffn", "mlp"),
        (Qwen3_5TextConfig, "attention", "linear_attn"),
    ],
)
@torch.no_grad()
def test_a_block_gets_the_experts_of_its_own_input(config_class, placement: str, block: str) -> None:
    llm, embeds = with_experts(config_class, placement), embeddings()
    seen: dict[str, Tensor] = {}

    def keep(_, args, kwargs, out) -> None:
        seen["input"] = kwargs.get("hidden_states", args[0] if args else None)
        seen["output"] = out[0] if isinstance(out, tuple) else out

    getattr(llm.layers[0], block).register_forward_hook(keep, with_kwargs=True)
    llm(inputs_embeds=embeds)
    adapted = seen["output"]
    with adapters_disabled(llm):
        llm(inputs_embeds=embeds)
    torch.testing.assert_close(adapted, seen["output"] + llm.layers[0].mome(seen["input"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config_class", [*DECODERS, Qwen3_5TextConfig])
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_untrained_and_disabled_experts_are_the_frozen_llm_bit_for_bit(config_class, placement: str) -> None:
    llm, frozen, embeds = with_experts(config_class, placement), decoder(config_class), embeddings()
    expected = frozen(inputs_embeds=embeds).last_hidden_state
    assert not torch.allclose(llm(inputs_embeds=embeds).last_hidden_state, expected, atol=1e-3)
    with adapters_disabled(llm):
        assert torch.equal(llm(inputs_embeds=embeds).last_hidden_state, expected)
    untrained = decoder(config_class)
    build_adapter(untrained, adapter_of({**MOME, "placement": placement}))
    assert torch.equal(untrained(inputs_embeds=embeds).last_hidden_state, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_balance_loss_of_the_first_of_two_forwards_is_right_under_checkpointing(placement: str) -> None:
    plain, embeds = with_experts(placement=placement, disjoint_routers=True, scales=["a", "b"]), embeddings()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})

    def run(llm: nn.Module, ids: list[int]) -> tuple[Tensor, Tensor]:
        collector = Collector()
        rows = AdapterInputs(torch.tensor(ids), kinds=torch.ones(3, 7, dtype=torch.int64), collector=collector)
        out = llm(inputs_embeds=embeds, adapter_inputs=rows, use_cache=False).last_hidden_state
        balance, usage = collector.take()
        assert [counts.shape for counts in usage] == [(3, 4, 5)] * 2
        return out, torch.stack(balance).mean(dim=0)

    for llm in (plain, checkpointed):
        llm.train()
        out, balance = run(llm, [0, 0, 0])
        run(llm, [1, 1, 1])
        (out.square().mean() + balance.sum()).backward()
        assert all(layer.mome.layer_input is None for layer in llm.layers)
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        if ".mome." in name:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
        if name.endswith("router"):
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).tolist() == [True, False]


@torch.no_grad()
def test_balance_is_one_where_experts_are_used_alike_and_leaves_padding_out() -> None:
    mome = Mome(8, num_experts=4, num_shared=0, top_k=1, bottleneck=2)
    mome.router.zero_()
    mome.router[0] = 50 * torch.eye(8)[:4]

    def report(kinds: list[int]) -> tuple[float, Tensor]:
        mome.inputs = AdapterInputs(kinds=torch.tensor([kinds]), collector=Collector())
        mome(torch.eye(8)[None, :4])
        balance, usage = mome.inputs.collector.take()
        return balance[0].item(), usage[0][0]

    balance, usage = report([0, 2, 2, 3])  # text, audio, audio, video
    assert balance == pytest.approx(1.0)
    expected = torch.zeros(4, 4)
    expected[0, 0] = expected[2, 1] = expected[2, 2] = expected[3, 3] = 1
    assert torch.equal(usage, expected)
    assert report([-1, -1, -1, 0])[0] == pytest.approx(4.0)  # one expert does it all


@pytest.mark.parametrize("adapter", [{**MOME, "placement": "layer"}, BANK], ids=["mome", "lora_bank"])
def test_beside_a_frozen_llm_in_bfloat16_what_trains_is_float32(adapter: dict) -> None:
    llm, embeds = decoder().to(torch.bfloat16), embeddings().to(torch.bfloat16)
    build_adapter(llm, adapter_of(adapter))
    llm.train()
    with torch.autocast("cpu", torch.bfloat16):
        collector = Collector()
        rows = AdapterInputs(kinds=torch.ones(3, 7, dtype=torch.int64), collector=collector)
        out = llm(inputs_embeds=embeds, adapter_inputs=rows).last_hidden_state
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    trained = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in trained)
    balance, usage = collector.take()
    assert all(reported.dtype == torch.float32 for reported in balance)
    assert all(reported.sum() == 3 * 7 * 2 for reported in usage)


def settings(placement: str, parts: dict[str, str] | None = None):
    config = tiny.settings_on(parts, ("audio", "video")) if parts else tiny.settings(("audio", "video"))
    return replace(config, adapter=adapter_of({**MOME, "placement": placement}))


ROWS = [
    ([tiny.random_media("audio", 37), tiny.random_media("video", 19), "transcribe speech and video to text."], "now"),
    ([tiny.random_media("audio", 24, seed=3), "transcribe speech to text."], "place"),
    (["how many objects?"], "two"),
]
BUDGETS = [Budget.parse(text) for text in ("audio=/4,video=/2", "audio=/5", "")]


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_row_in_a_mixed_batch_equals_the_row_alone_and_is_reported(placement: str) -> None:
    config = settings(placement)
    model, made = awake(tiny.model(config)), tiny.processor(config)
    inputs = made.expand(tiny.batch(made, ROWS), [BUDGETS], left_padding=False).inputs
    out = model(**inputs, adapter_report=True)
    assert out.expert_usage.shape == (2, 3, 4, 5)
    for row, (content, budget) in enumerate(zip(ROWS, BUDGETS, strict=True)):
        alone = made.expand(tiny.batch(made, [content]), [[budget]], left_padding=False).inputs
        single = model(**alone, adapter_report=True)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(out.logits[row, :length], single.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.auxiliary["balance"][row], single.auxiliary["balance"][0], rtol=1e-4, atol=1e-5)
        assert out.expert_usage[:, row].sum(dim=(1, 2)).tolist() == [2.0 * length] * 2  # top 2, in each of 2 layers
        soft = {medium: int(alone.get(f"num_{medium}_tokens", torch.zeros(1)).sum()) for medium in ("audio", "video")}
        assert out.expert_usage[0, row].sum(dim=1)[2:].tolist() == [2.0 * soft["audio"], 2.0 * soft["video"]]
    assert model(**inputs).auxiliary is None


def test_a_run_is_loaded_bit_for_bit_and_cannot_be_exported(tmp_path: Path) -> None:
    config = settings("layer", tiny.write_parts(tmp_path / "parts"))
    model, processor = build(config)
    names = set_trainables(model)
    assert [name for name in names if "layers.0" in name and "compressors" not in name] == [
        f"model.language_model.layers.0.mome.{part}" for part in ("down", "down_bias", "router", "up", "up_bias")
    ]
    awake(model)
    save_run(model, processor, tmp_path / "run")
    inputs = processor.expand(tiny.batch(processor, ROWS), [BUDGETS], left_padding=False).inputs
    loaded, _ = load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match=r"layers.0.mome \(Mome\) depends on its rows and cannot be merged"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_adapters(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placement": "head"}, r"adapter.placement: expected one of \['attention', 'ffn', 'layer'\], got head"),
        ({"top_k": 6}, r"adapter.top_k is 6, but num_experts is 5"),
        ({"bottleneck": 0}, r"adapter.bottleneck is 0"),
        ({"scales": ["audio=/4"]}, r"adapter.scales is .* but disjoint_routers is false"),
        ({"balance_weight": -1}, r"adapter.balance_weight is -1"),
    ],
)
def test_settings_that_make_no_experts_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_adapter(decoder(), adapter_of({**MOME, "placement": "layer", **change}))


def test_weights_in_bfloat16_give_what_those_in_float32_give() -> None:
    torch.manual_seed(0)
    mome = Mome(32, num_experts=5, num_shared=1, top_k=2, bottleneck=3)
    for weight in mome.parameters():
        weight.data.normal_(std=0.3)
    mome.to(torch.bfloat16)
    hidden = torch.randn(2, 7, 32, dtype=torch.bfloat16)
    out = mome(hidden)
    assert out.dtype == torch.bfloat16
    mome.float()
    torch.testing.assert_close(out.float(), mome(hidden.float()), rtol=1e-2, atol=1e-2)
