"""What `build_compressor` promises: the block of a config becomes the compressor it describes, or a named refusal."""

from fractions import Fraction

import pytest
import torch
from blocks import medium, merged, space

from mllm.budget import Budget, Extent, count_tokens
from mllm.compressors import Compressor, Hybrid, Pool, Query, Stack, build_compressor

SIZES = {"in_size": 16, "out_size": 8}
HYBRID = {"compressor": "hybrid", "budgets": [256, 64, 16, 1]}
M3 = {"compressor": "pool", "projector": {"before_pooling": True}, "budgets": [576, 144, 36, 9, 1]}
MQT = {"compressor": {"kind": "query", "num_queries": 256}, "budgets": {"start": 2, "stop": 256, "step": 2}}
OMNI = {
    "compressor": "pool",
    "projector": {"per_budget": True, "hidden_size": 32, "activation": "relu"},
    "budgets": ["/4", "/16"],
}
HAAR = {"compressor": {"kind": "pool", "order": "haar"}, "budgets": [576, 144, 36, 9]}
LLAMA_AVSR = {"compressor": "stack", "projector": {"norm": True}, "budgets": ["/2", "/3"]}
WINDOWS = {
    "compressor": {"kind": "query", "num_queries": 8, "window_frames": 16, "keys": "content"},
    "budgets": ["/2", "/4"],
}


def build(settings: dict, grid: tuple[int, int] | None = None) -> Compressor:
    name = "image" if grid else "audio"
    return build_compressor(name, medium(name, settings), **SIZES, grid=grid)


@pytest.mark.parametrize(
    ("settings", "grid", "kind", "nested"),
    [
        (M3, (24, 24), Pool, "pooled"),
        (MQT, (24, 24), Query, "prefix"),
        (HAAR, (24, 24), Pool, "prefix"),
        (OMNI, None, Pool, "pooled"),
        (LLAMA_AVSR, None, Stack, "none"),
        ({"compressor": "stack", "budgets": [144, 36]}, (24, 24), Stack, "none"),
        (WINDOWS, None, Query, "prefix"),
        (HYBRID, (24, 24), Hybrid, "none"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_counted_is_what_comes_out(settings: dict, grid, kind: type, nested: str, device: str) -> None:
    """At every trained budget the compressor fills exactly the tokens that `count_tokens` promises."""
    with torch.device(device):
        compressor = build(settings, grid)
    assert type(compressor) is kind
    assert compressor.nested == nested
    assert {parameter.device.type for parameter in compressor.parameters()} == {device}
    if device == "meta":
        return
    name = "image" if grid else "audio"
    extent = Extent(name, grid=grid, num_frames=0 if grid else 40, frames_per_second=Fraction(50))
    counted = space(**{name: settings})
    features = torch.randn(1, extent.length, 16, generator=torch.Generator().manual_seed(0))
    for amount in counted.media[name].trained[:: max(len(counted.media[name].trained) // 4, 1)]:
        (cost,) = count_tokens([extent], Budget({name: amount}), counted)
        soft = compressor(
            features,
            torch.tensor([extent.length]),
            tokens=torch.tensor([cost.tokens]),
            rates=torch.tensor([cost.rate]),
            max_tokens=600,
        )
        assert soft.shape == (1, 600, 8)
        assert soft[0].abs().sum(dim=1).gt(0).sum() == cost.tokens


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        *((M3, (24, 24)), (HAAR, (24, 24)), (MQT, (24, 24)), (HYBRID, (24, 24))),
        *((OMNI, None), (LLAMA_AVSR, None), (WINDOWS, None)),
    ],
)
def test_nothing_waits_for_the_device(settings: dict, grid) -> None:
    """On the meta device there are no numbers to look at: whatever would make the host wait raises there."""
    length = 576 if grid else 40
    with torch.device("meta"):
        costs = torch.ones(3, dtype=torch.int64)
        lengths = torch.full((3,), length)
        soft = build(settings, grid)(torch.zeros(3, length, 16), lengths, tokens=costs, rates=costs, max_tokens=50)
    assert soft.shape == (3, 50, 8)


def test_projectors_follow_the_settings() -> None:
    names = set(build(OMNI).state_dict())
    assert names == {
        f"projectors.{bank}.{layer}.{kind}" for bank in "01" for layer in "02" for kind in ("weight", "bias")
    }
    assert build(OMNI).projectors.budgets == (4, 16)
    assert build(M3, (24, 24)).projectors.budgets == ()
    assert build(merged(M3, {"projector": "linear"}), (24, 24)).projectors[0][0].weight.shape == (8, 16)
    assert build(M3, (24, 24)).projectors[0][0].weight.shape == (8, 16)
    assert "projectors.0.3.weight" in build(LLAMA_AVSR).state_dict()
    assert build(LLAMA_AVSR).projectors[1][0].weight.shape == (8, 48)


@pytest.mark.parametrize(
    ("num_queries", "grid", "rows"), [(256, (24, 24), 16), (64, (27, 27), 8), (12, (24, 24), 3), (8, (4, 8), 2)]
)
def test_queries_form_a_grid_like_that_of_the_features(num_queries: int, grid: tuple[int, int], rows: int) -> None:
    settings = {"compressor": {"kind": "query", "num_queries": num_queries}, "budgets": [1]}
    assert build(settings, grid).query_grid == (rows, num_queries // rows)


def test_heads_are_one_per_64_as_in_the_released_model() -> None:
    with torch.device("meta"):
        compressor = build_compressor("image", medium("image", MQT), in_size=1024, out_size=4096, grid=(24, 24))
    assert compressor.attn.num_heads == 16
    assert build(merged(MQT, {"compressor": {"num_heads": 4}}), (24, 24)).attn.num_heads == 4


@pytest.mark.parametrize(
    ("settings", "grid", "message"),
    [
        (
            merged(M3, {"compressor": {"keys": "content"}}),
            (24, 24),
            "model.image.compressor.keys goes with kind query, not with pool, which takes order",
        ),
        (
            merged(MQT, {"projector": {"norm": True}}),
            (24, 24),
            "model.image.projector does not go with compressor query",
        ),
        (
            merged(M3, {"compressor": {"order": "zigzag"}}),
            (24, 24),
            r"model.image.compressor.order: expected one of \['raster', 'haar'\], got zigzag",
        ),
        (
            merged(M3, {"compressor": {"order": "haar"}}),
            (24, 24),
            "1 tokens are no whole grid .* in Haar order; allowed: 9, 18, 36, 72, 144",
        ),
        (
            merged(HAAR, {"projector": {"per_budget": True}}),
            (24, 24),
            "model.image.projector.per_budget would break the nesting of order haar",
        ),
        (
            {"compressor": {"kind": "pool", "order": "haar"}, "budgets": ["/4"]},
            None,
            "unknown key model.audio.compressor.order; keys of model.audio.compressor: kind, num_queries",
        ),
        ({**M3, "budgets": ["/4"]}, (24, 24), r"model.image.budgets are rates \(/4\); images take counts"),
        ({**M3, "budgets": [577]}, (24, 24), r"577 tokens cannot be met; allowed are counts 1\.\.576"),
        (
            {**MQT, "budgets": [300]},
            (24, 24),
            r"300 tokens cannot be met; compressor.num_queries allows counts 1\.\.256",
        ),
        (
            merged(MQT, {"compressor": {"num_queries": 0}}),
            (24, 24),
            "model.image.compressor.num_queries is 0; it must be at least 1",
        ),
        (
            merged(MQT, {"compressor": {"num_queries": 37}, "budgets": [1]}),
            (24, 24),
            "model.image.compressor.num_queries=37 forms no grid like 24x24; the nearest",
        ),
        (merged(MQT, {"projector": {"per_budget": True}}), (24, 24), "projector does not go with compressor query"),
        (merged(MQT, {"compressor": {"keys": "both"}}), (24, 24), "compressor.keys: expected one of .*, got both"),
        ({**LLAMA_AVSR, "budgets": [4]}, None, r"compressor stack on a stream takes rates \(/4\)"),
        ({"compressor": "stack", "budgets": [100]}, (24, 24), "100 blocks of whole patches do not tile .* 64, 72, 96"),
        (
            merged(WINDOWS, {"compressor": {"window_frames": 0}}),
            None,
            "model.audio.compressor.window_frames is 0; it must be at least 1",
        ),
        ({**WINDOWS, "budgets": ["/3"]}, None, "/3 must divide compressor.window_frames=16 into at most"),
        ({**WINDOWS, "budgets": ["/1"]}, None, "/1 must divide compressor.window_frames=16 into at most"),
        ({**WINDOWS, "budgets": [4]}, None, r"compressor query on a stream takes rates"),
        (
            merged(OMNI, {"projector": {"activation": "tanh"}}),
            None,
            r"model.audio.projector.activation: expected one of \['gelu', 'relu'\], got tanh",
        ),
        (
            merged(OMNI, {"compressor": "mean"}),
            None,
            "model.audio.compressor.kind is 'mean'; allowed: pool, query, stack",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_by_key(settings: dict, grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings, grid)
