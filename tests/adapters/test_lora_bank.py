"""The bank: each row is served by its own experts, also when activations are computed again."""

import copy

import pytest
import torch
from blocks import adapter_of
from tiny_models import DECODERS, decoder, embeddings
from torch import Tensor, nn
from transformers import LlamaConfig

from mllm.adapters import adapters_disabled, build_adapter, merge_adapters
from mllm.adapters.adapter_inputs import AdapterInputs
from mllm.adapters.lora_bank import LoraBank, to_lora
from mllm.config.model import LoraBankConfig
from mllm.kv_cache.names import cache_argument, cache_of

SCALES, TASKS = ["audio=/4", "audio=/8", "audio=/16"], ["asr", "vsr"]


def banked(
    config_class: type = LlamaConfig, variant: str = "mss", targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")
) -> nn.Module:
    llm = decoder(config_class)
    names = {"mss": {"scales": SCALES}, "ss": {"scales": SCALES}, "st": {"tasks": TASKS}, "t": {"tasks": TASKS}}
    build_adapter(
        llm,
        adapter_of(
            {"kind": "lora_bank", "variant": variant, "rank": 3, "alpha": 6, "targets": targets, **names[variant]}
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in llm.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.3, generator=generator)
    return llm


def run(llm: nn.Module, embeds: Tensor, *ids: int, **options) -> Tensor:
    inputs = AdapterInputs(scale_ids=torch.tensor(ids), task_ids=torch.tensor(ids))
    return llm(inputs_embeds=embeds, adapter_inputs=inputs, **options).last_hidden_state


@pytest.mark.parametrize("config_class", DECODERS)
@torch.no_grad()
def test_each_row_is_served_by_its_own_experts(config_class) -> None:
    llm, embeds = banked(config_class), embeddings()
    together = run(llm, embeds, 0, 2, -1)
    for row, scale_id in enumerate((0, 2, -1)):
        torch.testing.assert_close(together[row], run(llm, embeds[row : row + 1], scale_id)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[1], run(llm, embeds[1:2], 1)[0], atol=1e-3)


@torch.no_grad()
def test_ids_may_differ_from_token_to_token() -> None:
    bank = banked().layers[0].self_attn.q_proj
    values = embeddings()
    bank.inputs = AdapterInputs(scale_ids=torch.tensor([[0, 1, 2, -1, 0, 1, 2]] * 3))
    mixed = bank(values)
    for position, scale_id in enumerate([0, 1, 2, -1]):
        bank.inputs = AdapterInputs(scale_ids=torch.full((3,), scale_id))
        torch.testing.assert_close(mixed[:, position], bank(values)[:, position])


@pytest.mark.parametrize("config_class", DECODERS)
def test_the_backward_pass_of_the_first_of_two_forwards_uses_its_own_ids(config_class) -> None:
    """Under checkpointing the layers run again after the second batch has long been through them."""
    plain, embeds = banked(config_class), embeddings()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for llm in (plain, checkpointed):
        llm.train()
        first = run(llm, embeds, 0, 0, 1, use_cache=False)
        run(llm, embeds, 2, 2, 2, use_cache=False).sum()
        first.square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4)
            served = parameter.grad.flatten(1).abs().amax(1) > 0
            assert served.tolist() == [True, True, True, False]  # shared, /4, /8, and nothing for /16


@pytest.mark.parametrize("variant", ["mss", "ss", "st", "t"])
@torch.no_grad()
def test_untrained_and_disabled_banks_are_the_frozen_llm_bit_for_bit(variant: str) -> None:
    frozen, llm, embeds = decoder(), banked(variant=variant), embeddings()
    expected = frozen(inputs_embeds=embeds).last_hidden_state
    assert not torch.allclose(run(llm, embeds, 0, 1, 0), expected, atol=1e-3)
    with adapters_disabled(llm):
        assert torch.equal(run(llm, embeds, 0, 1, 0), expected)
    for name, parameter in llm.named_parameters():
        if name.endswith("lora_B"):
            parameter.zero_()
    assert torch.equal(run(llm, embeds, 0, 1, 0), expected)


@pytest.mark.parametrize(("variant", "rank"), [("mss", 6), ("ss", 3), ("st", 6), ("t", 3)])
@torch.no_grad()
def test_one_scale_or_task_is_exactly_a_plain_lora_and_merges(variant: str, rank: int) -> None:
    llm, embeds = banked(variant=variant), embeddings()
    expected = run(llm, embeds, 1, 1, 1)
    settings = to_lora(llm, scale_id=1, task_id=1)
    assert settings == {"kind": "lora", "rank": rank, "alpha": 2.0 * rank, "targets": ["down_proj", "q_proj", "v_proj"]}
    torch.testing.assert_close(llm(inputs_embeds=embeds).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    merge_adapters(llm)
    assert not any("lora" in name for name, _ in llm.named_parameters())
    torch.testing.assert_close(llm(inputs_embeds=embeds).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_every_expert_has_a_gradient_whatever_the_rows_are() -> None:
    llm = banked(variant="st").train()
    run(llm, embeddings(), 1, 1, 1).sum().backward()
    trained = {name: weight for name, weight in llm.named_parameters() if weight.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"}
    assert all(weight.grad is not None for weight in trained.values())


@torch.no_grad()
def test_decoding_with_a_cache_and_left_padding_equals_one_pass() -> None:
    llm, embeds = banked(), embeddings(rows=2)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = run(llm, embeds, 0, 2, attention_mask=mask, position_ids=positions)
    inputs = AdapterInputs(scale_ids=torch.tensor([0, 2]))
    first = llm(
        inputs_embeds=embeds[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], adapter_inputs=inputs
    )
    outs = []
    for position in (5, 6):
        out = llm(
            inputs_embeds=embeds[:, position : position + 1],
            attention_mask=mask[:, : position + 1],
            position_ids=positions[:, position : position + 1],
            adapter_inputs=inputs,
            **cache_argument(cache_of(first)),
        )
        outs.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(outs, 1), whole[:, 5:], rtol=1e-4, atol=1e-5)
    alone = run(llm, embeds[:1, 3:], 0)
    torch.testing.assert_close(whole[:1, 3:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "sss"}, r"adapter.variant: expected one of \['ms', 'ss', 'mss'.*\], got sss"),
        ({"rank": 0}, "adapter.rank is 0"),
        ({"targets": ["c_attn"]}, "adapter.targets holds"),
        ({"scales": []}, r"adapter.scales is \[\], but variant mss"),
        ({"tasks": ["asr"]}, r"adapter.tasks is \['asr'\], but variant mss"),
    ],
)
def test_settings_that_make_no_bank_are_refused(change: dict, message: str) -> None:
    config = {"kind": "lora_bank", "variant": "mss", "rank": 3, "alpha": 6, "targets": ["q_proj"], "scales": SCALES}
    with pytest.raises(ValueError, match=message):
        build_adapter(decoder(), adapter_of({**config, **change}))


def test_missing_ids_and_absent_experts_are_refused() -> None:
    llm = banked()
    with pytest.raises(ValueError, match="experts per scale, but scale_ids were not given"):
        llm(inputs_embeds=embeddings())
    with pytest.raises(ValueError, match="3 experts per scale; scale 3 is none of them"):
        to_lora(llm, scale_id=3)


def test_a_decoder_without_self_attention_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers without self_attn or mlp"):
        build_adapter(
            nn.ModuleDict({"q_proj": nn.Linear(2, 2)}),
            LoraBankConfig(variant="ms", rank=1, alpha=1, targets=["q_proj"]),
        )


def test_a_bank_counts_its_experts_in_order() -> None:
    bank = LoraBank(nn.Linear(4, 6), has_shared=True, num_scales=2, num_tasks=3, rank=2, alpha=4)
    assert bank.lora_A.shape == (6, 2, 4)
    assert bank.lora_B.shape == (6, 6, 2)
    assert bank.expert_indices(1, 2) == [0, 2, 5]
