"""Our parts keep the contracts that `mllm.testing` offers to others, and parts that do not are found out."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, HubertConfig, LlamaConfig, LlamaModel, WhisperConfig

from mllm.adapters.adapter_inputs import KEYWORD, AdapterInputs
from mllm.adapters.lora import inject
from mllm.adapters.lora_bank import inject_bank
from mllm.adapters.mome import inject_mome
from mllm.budget import Amount, MediumSpace
from mllm.compressors import Hybrid, Pool, Projector, ProjectorBank, Query, Stack
from mllm.compressors.base import Compressor
from mllm.encoders import build_encoder, encoder_facts
from mllm.testing import CompressorCase, EncoderCase, check_adapter, check_compressor, check_encoder
from mllm.testing.compressors import check_batch_equals_single, check_counts, check_nesting, check_padding, check_shapes

IN_SIZE, OUT_SIZE = 16, 24


def bank(*sizes: int, budgets: tuple[int, ...] = ()) -> ProjectorBank:
    projectors = [Projector(in_size=size, out_size=OUT_SIZE, hidden_size=20) for size in sizes or (IN_SIZE,)]
    return ProjectorBank(projectors, budgets=budgets)


def counts(*values: int) -> tuple[Amount, ...]:
    return tuple(Amount("tokens", Fraction(value)) for value in values)


def rates(*values: int) -> tuple[Amount, ...]:
    return tuple(Amount("rate", Fraction(value)) for value in values)


def query(grid: tuple[int, int], num_queries: tuple[int, int], **options: Any) -> Query:
    sizes: dict[str, Any] = {"in_size": IN_SIZE, "out_size": OUT_SIZE, "num_heads": 2}
    return Query(query_grid=num_queries, feature_grid=grid, **sizes, **options)


def case(name: str) -> CompressorCase:
    torch.manual_seed(0)
    sizes = {"in_size": IN_SIZE, "out_size": OUT_SIZE}
    grid = (4, 4)
    images = {
        "pool": (Pool(projectors=bank(), grid=grid), MediumSpace("image", "pool", counts(16, 5, 1))),
        "pool projected first": (
            Pool(projectors=ProjectorBank([nn.Linear(IN_SIZE, OUT_SIZE)]), grid=grid, project_first=True),
            MediumSpace("image", "pool", counts(16, 5, 1)),
        ),
        "haar": (
            Pool(projectors=bank(), grid=grid, order="haar"),
            MediumSpace("image", "pool", counts(16, 4, 1), order="haar"),
        ),
        "query": (query(grid, (2, 3)), MediumSpace("image", "query", counts(6, 3, 1), max_tokens=6)),
        "query of content": (
            query(grid, (2, 3), keys="content"),
            MediumSpace("image", "query", counts(6, 3, 1), max_tokens=6),
        ),
        "stack": (
            Stack(projectors=bank(16 * IN_SIZE, 4 * IN_SIZE, budgets=(1, 4)), grid_rows=(1, 2), grid=grid),
            MediumSpace("image", "stack", counts(4, 1), between=False),
        ),
        "hybrid": (
            Hybrid(in_size=IN_SIZE, projector=bank()[0], grid=grid, anchors=(1, 4), max_tokens=8, num_heads=2),
            MediumSpace("image", "hybrid", counts(8, 4, 3, 1), max_tokens=8),
        ),
    }
    streams = {
        "pool of a stream": (Pool(projectors=bank()), MediumSpace("audio", "pool", rates(2, 3, 12))),
        "pool with a projector per rate": (
            Pool(projectors=bank(IN_SIZE, IN_SIZE, budgets=(2, 12))),
            MediumSpace("audio", "pool", rates(2, 12), between=False),
        ),
        "stack of a stream": (
            Stack(projectors=bank(2 * IN_SIZE, 12 * IN_SIZE, budgets=(2, 12))),
            MediumSpace("audio", "stack", rates(2, 12), between=False),
        ),
        "query of a stream": (
            query((1, 12), (1, 6), windowed=True),
            MediumSpace("audio", "query", rates(2, 4, 12), max_tokens=6, window_frames=12),
        ),
    }
    if name in streams:
        compressor, space = streams[name]
        return CompressorCase(compressor, space, **sizes, refused=("/49",) if "stack" in name else ("/1000",))
    if name.endswith("own grids"):
        compressor, space = images[name.removesuffix(" on own grids")]
        return CompressorCase(compressor, space, **sizes, item_grids=((4, 4), (3, 6), (2, 9)), refused=("99",))
    compressor, space = images[name]
    return CompressorCase(compressor, space, **sizes, grid=grid, refused=("17", "/2"))


IMAGES = ["pool", "pool projected first", "haar", "query", "query of content", "stack", "hybrid"]
STREAMS = ["pool of a stream", "pool with a projector per rate", "stack of a stream", "query of a stream"]


@pytest.mark.parametrize("name", [*IMAGES, *STREAMS, "pool on own grids", "query on own grids"])
def test_our_compressors_keep_the_contract(name: str) -> None:
    check_compressor(case(name))


class Broken(Compressor):
    """A pooling that can be broken in several ways."""

    nested = "prefix"

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.pool = Pool(projectors=bank())

    def forward(self, features: Tensor, lengths: Tensor, **budgets: Any) -> Tensor:
        if self.fault == "batch":
            features = features - features.mean(dim=0)
        if self.fault == "padding":
            features = features + features.mean(dim=1, keepdim=True)
        soft = self.pool(features, lengths, **budgets)
        return soft + 1 if self.fault == "shape" else soft


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        ("batch", check_batch_equals_single, "item 0 at /2 differs in a batch of /2, /3, /12"),
        ("padding", check_padding, "at /2 padding is read"),
        ("shape", check_shapes, "at /2 item 0 is not zero beyond its 12 tokens"),
    ],
)
def test_a_compressor_that_breaks_a_promise_is_found_out(fault: str, check: Any, message: str) -> None:
    space = MediumSpace("audio", "pool", rates(2, 3, 12))
    with pytest.raises(AssertionError, match=message):
        check(CompressorCase(Broken(fault), space, IN_SIZE, OUT_SIZE))


def test_a_budget_that_should_be_refused_and_a_prefix_that_is_none_are_found_out() -> None:
    pooled = case("pool")
    lenient = CompressorCase(pooled.compressor, pooled.space, IN_SIZE, OUT_SIZE, grid=(4, 4), refused=("7",))
    with pytest.raises(AssertionError, match=r"7 should be refused, and is counted as \[7, 7, 7\]"):
        check_counts(lenient)
    pooled.compressor.nested = "prefix"
    with pytest.raises(AssertionError, match="the tokens of item 0 at 5 are not the first of those at 16"):
        check_nesting(pooled)


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
IMAGE_CONFIG = CLIPVisionConfig(**SMALL, image_size=16, patch_size=4)
AUDIO_CONFIG = HubertConfig(
    **SMALL, conv_dim=[8, 8], conv_kernel=[10, 4], conv_stride=[5, 2], num_feat_extract_layers=2,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
WINDOW_CONFIG = WhisperConfig(
    d_model=16, encoder_attention_heads=2, encoder_ffn_dim=32, encoder_layers=2, num_mel_bins=4, max_source_positions=8
)


@pytest.mark.parametrize("medium", ["image", "audio", "window"])
def test_our_encoders_keep_the_contract(medium: str) -> None:
    torch.manual_seed(0)
    config: Any = {"image": IMAGE_CONFIG, "audio": AUDIO_CONFIG, "window": WINDOW_CONFIG}[medium]
    encoder = build_encoder("image" if medium == "image" else "audio", config)
    inputs, sizes = {
        "image": ([torch.randn(3, 16, 16) for _ in range(3)], None),
        "audio": ([torch.randn(length) for length in (200, 331, 264)], [200, 331, 264]),
        "window": ([torch.randn(4, 16) for _ in range(2)], [640, 2560]),
    }[medium]
    check_encoder(EncoderCase(encoder, encoder_facts(config), inputs, sizes))


LLM = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=8)
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
MOME = {"num_experts": 3, "num_shared": 1, "top_k": 2, "bottleneck": 4}


@pytest.mark.parametrize("kind", ["lora", "lora_bank", "mome"])
def test_our_adapters_keep_the_contract(kind: str) -> None:
    torch.manual_seed(0)
    ids, scales = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 1])

    def call(llm: nn.Module) -> Tensor:
        inputs = {} if kind == "lora" else {KEYWORD: AdapterInputs(scale_ids=scales)}
        return llm(input_ids=ids, use_cache=False, **inputs).last_hidden_state

    def put_in(llm: nn.Module) -> None:
        llm.requires_grad_(False)
        if kind == "lora":
            inject(llm, **LORA)
        elif kind == "lora_bank":
            inject_bank(llm, variant="ss", scales=["image=1", "image=4"], **LORA)
        else:
            inject_mome(llm, placement="layer", **MOME)

    check_adapter(LlamaModel(LLM).eval(), put_in, call)
