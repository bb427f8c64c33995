"""What `build_compressor` promises: the block of a config becomes the compressor it describes, or a named refusal."""

from fractions import Fraction

import pytest
import torch

from mllm.budget import Budget, Extent, Space, count_tokens
from mllm.compressors import SETTINGS, Compressor, Hybrid, Pool, Query, Stack, build_compressor

SIZES = {"in_size": 16, "out_size": 8}
HYBRID = {"compressor": "hybrid", "budgets": [256, 64, 16, 1]}
M3 = {"compressor": "pool", "budgets": [576, 144, 36, 9, 1], "project_first": True}
MQT = {"compressor": "query", "budgets": {"start": 2, "stop": 256, "step": 2}, "num_queries": 256}
OMNI = {
    "compressor": "pool",
    "budgets": ["/4", "/16"],
    "per_budget_projector": True,
    "projector_size": 32,
    "projector_activation": "relu",
}
HAAR = {"compressor": "pool", "budgets": [576, 144, 36, 9], "order": "haar"}
LLAMA_AVSR = {"compressor": "stack", "budgets": ["/2", "/3"], "projector_norm": True}
WINDOWS = {"compressor": "query", "budgets": ["/2", "/4"], "num_queries": 8, "window_frames": 16, "keys": "content"}


def build(settings: dict, grid: tuple[int, int] | None = None) -> Compressor:
    return build_compressor("image" if grid else "audio", settings, **SIZES, grid=grid)


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
    medium = "image" if grid else "audio"
    extent = Extent(medium, grid=grid, num_frames=0 if grid else 40, frames_per_second=Fraction(50))
    space = Space.from_settings({medium: settings})
    features = torch.randn(1, extent.length, 16, generator=torch.Generator().manual_seed(0))
    for amount in space.media[medium].trained[:: max(len(space.media[medium].trained) // 4, 1)]:
        (cost,) = count_tokens([extent], Budget({medium: amount}), space)
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
    assert build({**M3, "projector_size": None}, (24, 24)).projectors[0][0].weight.shape == (8, 16)
    assert build(M3, (24, 24)).projectors[0][0].weight.shape == (8, 16)
    assert "projectors.0.3.weight" in build(LLAMA_AVSR).state_dict()
    assert build(LLAMA_AVSR).projectors[1][0].weight.shape == (8, 48)


@pytest.mark.parametrize(
    ("num_queries", "grid", "rows"), [(256, (24, 24), 16), (64, (27, 27), 8), (12, (24, 24), 3), (8, (4, 8), 2)]
)
def test_queries_form_a_grid_like_that_of_the_features(num_queries: int, grid: tuple[int, int], rows: int) -> None:
    settings = {"compressor": "query", "budgets": [1], "num_queries": num_queries}
    assert build(settings, grid).query_grid == (rows, num_queries // rows)


def test_heads_are_one_per_64_as_in_the_released_model() -> None:
    with torch.device("meta"):
        compressor = build_compressor("image", MQT, in_size=1024, out_size=4096, grid=(24, 24))
    assert compressor.attn.num_heads == 16
    assert build({**MQT, "query_size": 32, "query_heads": 4}, (24, 24)).attn.in_proj_weight.shape == (96, 32)


@pytest.mark.parametrize(
    ("settings", "grid", "message"),
    [
        ({**M3, "keys": "content"}, (24, 24), "media.image.keys does not apply to compressor 'pool'; allowed: project"),
        ({**MQT, "projector_norm": True}, (24, 24), "projector_norm does not apply to compressor 'query'"),
        ({**M3, "order": "zigzag"}, (24, 24), "media.image.order='zigzag' is not one of: raster, haar"),
        ({**M3, "order": "haar"}, (24, 24), "1 tokens are no whole grid .* in Haar order; allowed: 9, 18, 36, 72, 144"),
        ({**HAAR, "per_budget_projector": True}, (24, 24), "would break the nesting of order 'haar'"),
        ({"compressor": "pool", "budgets": ["/4"], "order": "haar"}, None, "is an order of grids, and this is a str"),
        ({**M3, "budgets": ["/4"]}, (24, 24), r"budgets are rates \(/4\); compressor 'pool' on a grid takes counts"),
        ({**M3, "budgets": [577]}, (24, 24), r"577 tokens cannot be met; allowed are counts 1\.\.576"),
        ({**MQT, "budgets": [300]}, (24, 24), r"300 tokens cannot be met; allowed are counts 1\.\.256"),
        ({**MQT, "num_queries": 0}, (24, 24), "media.image.num_queries must be at least 1"),
        ({**MQT, "num_queries": 37, "budgets": [1]}, (24, 24), "num_queries=37 forms no grid like 24x24; the nearest"),
        ({**MQT, "per_budget_projector": True}, (24, 24), "would break the nesting"),
        ({**MQT, "keys": "both"}, (24, 24), "keys='both' is not one of"),
        ({**LLAMA_AVSR, "budgets": [4]}, None, r"compressor 'stack' on a stream takes rates \(/4\)"),
        ({"compressor": "stack", "budgets": [100]}, (24, 24), "100 blocks of whole patches do not tile .* 64, 72, 96"),
        ({**WINDOWS, "window_frames": 0}, None, "media.audio.window_frames must be at least 1"),
        ({**WINDOWS, "budgets": ["/3"]}, None, "/3 must divide window_frames=16 into at most num_queries=8 tokens"),
        ({**WINDOWS, "budgets": ["/1"]}, None, "/1 must divide window_frames=16 into at most num_queries=8 tokens"),
        ({**WINDOWS, "budgets": [4]}, None, r"compressor 'query' on a stream takes rates"),
        ({**OMNI, "projector_activation": "tanh"}, None, "is not one of: gelu, relu"),
        ({**OMNI, "compressor": "mean"}, None, "allowed: query, pool, stack, hybrid"),
    ],
)
def test_what_cannot_be_built_is_refused_by_key(settings: dict, grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings, grid)


def test_the_keys_that_are_read_are_listed() -> None:
    assert set(SETTINGS) == {
        *("keys", "query_size", "query_heads", "project_first", "order", "anchors"),
        *("projector_size", "projector_norm", "projector_activation"),
        *("projector_experts", "projector_top_k", "projector_balance_weight", "projector_z_weight"),
    }
