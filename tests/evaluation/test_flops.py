"""What the cost model promises: the FLOPs that torch counts, part by part, and bytes of cache one can do by hand."""

from collections.abc import Callable
from typing import Any

import blocks
import pytest
import tiny
import torch
from blocks import adapter_of, encoder_block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Gemma3TextConfig,
    HubertConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    WhisperConfig,
)

from mllm.adapters import build_adapter
from mllm.adapters.adapter_inputs import AdapterInputs
from mllm.budget import Budget
from mllm.compressors import build_compressor
from mllm.config.model import LoraConfig, MediumConfig
from mllm.encoders import AVHubertConfig, build_encoder, encoder_facts
from mllm.evaluation.flops import (
    Item,
    attention_flops,
    compressor_flops,
    encoder_flops,
    kv_bytes_per_token,
    llm_flops,
    published_flops,
    request_cost,
    train_factor,
)
from mllm.kv_cache.names import cache_argument, cache_of

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "vocab_size": 100}


def counted(run: Callable[[], Any]) -> int:
    """FLOPs that torch sees. Its counter knows no CPU attention kernel, so attention is run as plain products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def masked_pairs_flops(config: Any, num_tokens: int) -> int:
    """What plain attention computes and a causal mask then throws away; the formula leaves it out."""
    pairs = num_tokens**2 - num_tokens * (num_tokens + 1) // 2
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**DECODER, head_dim=16),
        Qwen2Config(**DECODER, head_dim=8),
        Qwen3Config(**DECODER, head_dim=16),
        Gemma3TextConfig(**DECODER, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_llm_flops_are_those_that_run(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(13)[None]
    prefill = llm_flops(config, num_tokens=13, num_logits=1)
    assert prefill + masked_pairs_flops(config, 13) == counted(lambda: model(ids, logits_to_keep=1))
    cache = cache_of(model(ids, use_cache=True))
    one_more = llm_flops(config, num_tokens=1, past_tokens=13, num_logits=1)
    assert one_more == counted(lambda: model(ids[:, :1], **cache_argument(cache)))


def test_tokens_in_one_pass_cost_what_they_cost_one_by_one() -> None:
    config = LlamaConfig(**DECODER)
    together = llm_flops(config, num_tokens=5, past_tokens=7, num_logits=5)
    assert together == sum(llm_flops(config, num_tokens=1, past_tokens=7 + i, num_logits=1) for i in range(5))


LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
SCALES = ["audio=/4", "audio=/8"]
EXPERTS = {"kind": "mome", "placement": "ffn", "num_experts": 5, "num_shared": 2, "top_k": 2, "bottleneck": 3}


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lora", **LORA},
        {"kind": "lora_bank", "variant": "mss", "scales": SCALES, "tasks": [], **LORA},
        {"scales": [], **EXPERTS},
        {"scales": SCALES, "disjoint_routers": True, **EXPERTS},
    ],
)
def test_an_adapter_that_is_not_merged_costs_its_own_products(adapter: dict[str, Any]) -> None:
    config = LlamaConfig(**DECODER)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    build_adapter(model.model, adapter_of(adapter))
    expected = llm_flops(config, num_tokens=6, num_logits=6, adapter=adapter_of(adapter))
    rows = {} if adapter["kind"] == "lora" else {"adapter_inputs": AdapterInputs(scale_ids=torch.tensor([1]))}
    assert expected + masked_pairs_flops(config, 6) == counted(lambda: model(torch.arange(6)[None], **rows))


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize(
    "config",
    [
        CLIPVisionConfig(**SMALL, image_size=56, patch_size=14),
        SiglipVisionConfig(**SMALL, image_size=56, patch_size=14),
        Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56, use_swiglu_ffn=True),
    ],
    ids=lambda config: config.model_type,
)
def test_vision_flops_are_those_of_the_layers_that_are_read(config: PreTrainedConfig, layer: int) -> None:
    block = encoder_block(config, {"feature_layer": layer})
    encoder = build_encoder("image", _plain(config), block).eval()
    expected = encoder_flops(config, Item("image", 16, 4), block)
    assert expected == counted(lambda: encoder(torch.zeros(1, 3, 56, 56)))


def test_whisper_always_costs_its_whole_window() -> None:
    config = WhisperConfig(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8)
    config.max_source_positions = 50
    encoder = build_encoder("audio", _plain(config)).eval()
    run = counted(lambda: encoder(torch.zeros(1, 8, 100), torch.tensor([8000])))
    assert encoder_flops(config, Item("audio", 25, 4)) == run == encoder_flops(config, Item("audio", 50, 4))


def test_waveform_flops_are_those_of_the_shortest_clip_with_so_many_frames() -> None:
    config = HubertConfig(**SMALL, conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    encoder = build_encoder("audio", _plain(config)).eval()
    num_frames = encoder_facts(config).num_frames
    assert num_frames is not None
    shortest = next(n for n in range(400, 20_000) if num_frames(n) == 20)
    predicted = encoder_flops(config, Item("audio", 20, 4))
    assert predicted == counted(lambda: encoder(torch.zeros(1, shortest), torch.tensor([shortest])))
    longest = shortest + 319  # the same frames, with convolutions over samples that no frame needs
    assert num_frames(longest) == 20
    run = counted(lambda: encoder(torch.zeros(1, longest), torch.tensor([longest])))
    assert predicted == pytest.approx(run, rel=1 / 20)  # less than the work of one frame more


@pytest.mark.parametrize(("height", "width"), [(88, 88), (33, 45)])
def test_lip_flops_follow_the_size_of_the_crop(height: int, width: int) -> None:
    config = AVHubertConfig(
        **SMALL, resnet_channels=(8, 12, 16, 24), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    encoder = build_encoder("video", _plain(config)).eval()
    video, lengths = torch.zeros(1, 6, 1, height, width), torch.tensor([6])
    assert encoder_flops(config, Item("video", 6, 3, height, width)) == counted(lambda: encoder(video, lengths))


@pytest.mark.parametrize(
    ("medium", "settings", "budget"),
    [
        ("image", {"compressor": "pool", "budgets": [1, 4, 16]}, (5, 0)),
        (
            "image",
            {"compressor": "pool", "projector": {"kind": "linear", "before_pooling": True}, "budgets": [1, 4]},
            (4, 0),
        ),
        ("image", {"compressor": "pool", "projector": {"per_budget": True}, "budgets": [1, 4]}, (4, 0)),
        ("image", {"compressor": "stack", "budgets": [1, 4, 16]}, (4, 0)),
        ("image", {"compressor": {"kind": "pool", "order": "haar"}, "budgets": [1, 4, 16]}, (4, 0)),
        ("image", {"compressor": {"kind": "query", "num_queries": 4}, "budgets": [1, 4]}, (3, 0)),
        ("image", {"compressor": {"kind": "query", "num_queries": 16, "num_heads": 3}, "budgets": [16]}, (16, 0)),
        ("image", {"compressor": {"kind": "query", "num_queries": 4}, "budgets": [4]}, (4, 0)),
        ("image", {"compressor": {"kind": "query", "num_queries": 4, "keys": "content"}, "budgets": [4]}, (4, 0)),
        ("image", {"compressor": {"kind": "hybrid", "anchors": [4, 9], "num_heads": 3}, "budgets": [14]}, (12, 0)),
        ("image", {"compressor": {"kind": "hybrid", "anchors": [4, 9]}, "budgets": [14]}, (9, 0)),
        ("image", {"compressor": {"kind": "hybrid", "anchors": [4]}, "budgets": [12]}, (1, 0)),
        ("audio", {"compressor": "pool", "projector": {"hidden_size": 20}, "budgets": ["/2", "/4"]}, (4, 4)),
        ("audio", {"projector": {"kind": "words", "num_words": 9}, "budgets": ["/2", "/4"]}, (4, 4)),
        ("audio", {"projector": {"kind": "words", "hidden_size": 5, "stretch_frames": 1}, "budgets": ["/2"]}, (8, 2)),
        ("audio", {"compressor": "stack", "budgets": ["/2", "/5"]}, (8, 2)),
        ("audio", {"compressor": {"kind": "query", "num_queries": 2, "window_frames": 8}, "budgets": ["/4"]}, (6, 4)),
    ],
)
def test_compressor_flops_are_those_that_run(medium: str, settings: dict[str, Any], budget: tuple[int, int]) -> None:
    num_features, grid = (16, (4, 4)) if medium == "image" else (17, None)
    block = blocks.medium(medium, settings)
    compressor = build_compressor(medium, block, in_size=12, out_size=24, grid=grid).eval().requires_grad_(False)
    tokens, rate = budget

    @torch.no_grad()
    def answer() -> torch.Tensor:
        features, length = torch.zeros(1, num_features, 12), torch.tensor([num_features])
        costs = {"tokens": torch.tensor([tokens]), "rates": torch.tensor([rate])}
        return compressor(features, length, **costs, max_tokens=tokens)

    answer()  # folds what is constant
    run = counted(answer)
    assert compressor_flops(block, Item(medium, num_features, tokens), in_size=12, out_size=24) == run


def test_a_request_is_the_sum_of_its_parts() -> None:
    config = tiny.settings(("image",))
    model, processor = tiny.model(config), tiny.processor(config)
    batch = tiny.batch(processor, [([tiny.random_media("image"), "what is it?"], "red")])
    expanded = processor.expand(batch, [[Budget.parse("image=4")]], left_padding=True)
    length = expanded.inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    cost = request_cost(model.config, [Item("image", 64, 4)], num_prompt_tokens=length, num_new_tokens=1)
    run = counted(lambda: model(**expanded.inputs, logits_to_keep=1))
    # The compressor of a batch fills up to the longest prompt; its products are the only ones that differ.
    padding = _pool_padding_flops(model.config.media["image"], length)
    assert cost.total + masked_pairs_flops(model.config.text_config, length) + padding == run
    assert cost.decode == 0
    assert cost.kv_bytes == length * 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of size 8, float32


def test_beams_and_answers_cost_what_generate_runs() -> None:
    config = tiny.model(tiny.settings(("image",))).config
    one = request_cost(config, [], num_prompt_tokens=20, num_new_tokens=4, dtype="bfloat16")
    three = request_cost(config, [], num_prompt_tokens=20, num_new_tokens=4, num_beams=3, dtype="bfloat16")
    options = {"num_logits": 1, "adapter": config.adapter}
    shared = llm_flops(config.text_config, num_tokens=19, **options)
    assert three.prefill == shared + 3 * llm_flops(config.text_config, num_tokens=1, past_tokens=19, **options)
    assert three.decode == 3 * one.decode
    assert one.kv_bytes == 23 * 2 * 2 * 2 * 8 * 2
    assert one.decode == llm_flops(
        config.text_config, num_tokens=3, past_tokens=20, num_logits=3, adapter=config.adapter
    )


def test_beams_run_what_they_cost() -> None:
    config = tiny.settings(("image",), adapter=False)
    model = tiny.model(config)
    model.set_attn_implementation("eager")
    ids = torch.arange(40, 60)[None]
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    run = counted(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    cost = request_cost(model.config, [], num_prompt_tokens=20, num_new_tokens=4, num_beams=3)
    assert run - masked_pairs_flops(model.config.text_config, 19) == cost.total


def test_published_teraflops_of_the_8b_speech_model() -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    lora = LoraConfig(rank=64, targets=["q_proj", "v_proj"])
    counts = (757, 257, 182, 163, 88)  # ten seconds at (1,1), (4,2), (4,5), (16,2), (16,5), and seven tokens of text
    assert published_flops(config, num_tokens=1, adapter=lora) == 2 * (8_030_261_248 - 128256 * 4096 + 27_262_976)
    teraflops = [f"{published_flops(config, num_tokens=count, adapter=lora) / 1e12:.2f}" for count in counts]
    assert teraflops == ["11.40", "3.87", "2.74", "2.46", "1.33"]
    with_attention = llm_flops(config, num_tokens=757) - llm_flops(config, num_tokens=1) * 757
    assert attention_flops(config, num_tokens=757) - 757 * attention_flops(config, num_tokens=1) == with_attention


def test_published_numbers_of_llama_1b() -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256,
    )  # fmt: skip
    per_token = llm_flops(config, num_tokens=2) - llm_flops(config, num_tokens=1)
    assert per_token == pytest.approx(1.95e9, rel=0.01)
    assert llm_flops(config, num_tokens=0, num_logits=1) == pytest.approx(0.525e9, rel=0.01)
    assert kv_bytes_per_token(config, dtype="bfloat16") == 32_768
    assert [train_factor(), train_factor(llm_trains=True), train_factor(checkpointing=True)] == [2, 3, 3]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: llm_flops(MixtralConfig(), num_tokens=1), "mixture of experts"),
        (lambda: llm_flops(LlamaConfig(num_hidden_layers=1, layer_types=["linear_attention"]), num_tokens=1), "linear"),
        (lambda: llm_flops(WhisperConfig(intermediate_size=None), num_tokens=1), "no cost formula for LLM 'whisper'"),
        (lambda: encoder_flops(LlamaConfig(), Item("image", 1, 1)), "no cost formula for encoder 'llama'; there are"),
        (lambda: kv_bytes_per_token(LlamaConfig(), dtype="int3"), "dtype is 'int3'; allowed: float32"),
    ],
)
def test_what_has_no_formula_is_refused(run: Callable[[], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    config._attn_implementation = "eager"
    return config


def _pool_padding_flops(block: MediumConfig, max_tokens: int) -> int:
    sizes = {"in_size": 16, "out_size": 32}
    flops = compressor_flops(block, Item("image", 64, 4), **sizes)
    return compressor_flops(block, Item("image", 64, max_tokens), **sizes) - flops
