"""What queries promise: prefixes, the attention of the released model, and windows on streams."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.compressors import Query
from mllm.compressors.folded_attention import pools_first
from mllm.compressors.query import CrossAttention, sincos_positions

SIZE, OUT = 16, 6


def image_query(keys: str, **changes) -> Query:
    torch.manual_seed(0)
    sizes = {"in_size": SIZE, "out_size": OUT, "query_grid": (3, 3), "feature_grid": (5, 5), "num_heads": 4}
    return Query(keys=keys, **{**sizes, **changes}).eval()


def stream_query(keys: str, queries: int = 4, window: int = 8) -> Query:
    return image_query(keys, query_grid=(1, queries), feature_grid=(1, window), windowed=True)


def costs(*pairs: tuple[int, int]) -> dict[str, Tensor]:
    """Tensors of (tokens, rate) per item."""
    tokens, rates = zip(*pairs, strict=True)
    return {"tokens": torch.tensor(tokens), "rates": torch.tensor(rates)}


def clips(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random clips padded with NaN, so that any use of the padding shows."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.full((len(lengths), max(lengths), SIZE), float("nan"))
    for clip, length in zip(batch, lengths, strict=True):
        clip[:length] = torch.randn(length, SIZE, generator=generator)
    return batch, torch.tensor(lengths)


@pytest.mark.parametrize("keys", ["position", "content"])
@pytest.mark.parametrize("size", [SIZE, 24])
@torch.no_grad()
def test_the_tokens_of_a_budget_are_the_first_of_any_larger_one(keys: str, size: int) -> None:
    compressor = image_query(keys, size=size)
    image, lengths = torch.randn(1, 25, SIZE), torch.tensor([25])
    largest = compressor(image, lengths, **costs((9, 0)), max_tokens=9)
    for count in range(1, 10):
        soft = compressor(image, lengths, **costs((count, 0)), max_tokens=count)
        torch.testing.assert_close(soft, largest[:, :count])


@pytest.mark.parametrize("keys", ["position", "content"])
@torch.no_grad()
def test_on_streams_the_prefix_holds_in_every_window(keys: str) -> None:
    compressor = stream_query(keys)
    clip, lengths = clips(20)  # two windows of 8 frames and one of 4
    largest = compressor(clip, lengths, **costs((12, 2)), max_tokens=12)[0].unflatten(0, (3, 4))
    for rate, per_window in ((4, 2), (8, 1)):
        soft = compressor(clip, lengths, **costs((3 * per_window, rate)), max_tokens=3 * per_window)[0]
        torch.testing.assert_close(soft.unflatten(0, (3, per_window)), largest[:, :per_window])


@pytest.mark.parametrize("keys", ["position", "content"])
@torch.no_grad()
def test_a_window_reads_its_own_frames_and_the_last_one_only_those_that_exist(keys: str) -> None:
    compressor = stream_query(keys)
    clip, lengths = clips(20)
    soft = compressor(clip, lengths, **costs((12, 2)), max_tokens=12)[0]
    for window, stretch in enumerate(clip[0].split(8)):
        alone = compressor(stretch[None], torch.tensor([len(stretch)]), **costs((4, 2)), max_tokens=4)[0]
        torch.testing.assert_close(soft[4 * window : 4 * window + 4], alone)


@torch.no_grad()
def test_position_keys_do_not_look_at_the_image_and_content_keys_do() -> None:
    """With position keys the whole is linear in the normed features: a fixed pooling, as MQT was released."""
    first, second = torch.randn(2, 1, 25, SIZE)
    for keys, fixed in (("position", True), ("content", False)):
        compressor = image_query(keys)
        compressor.ln_v = nn.Identity()
        bias = compressor._read(torch.zeros(1, 25, SIZE))
        together = compressor._read(first + second) - bias
        apart = compressor._read(first) + compressor._read(second) - 2 * bias
        assert torch.allclose(together, apart, atol=1e-5) is fixed


@torch.no_grad()
def test_the_attention_is_that_of_the_released_model() -> None:
    """The forward pass of MQT written out with torch's own attention, bicubic positions and no projector bias."""
    compressor = image_query("position")
    released = nn.MultiheadAttention(SIZE, 4, batch_first=True)
    released.load_state_dict(compressor.attn.state_dict())
    table = compressor.pos_embed.T.unflatten(1, (3, 3))[None]
    positions = functional.interpolate(table, size=(5, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    image = torch.randn(2, 25, SIZE)
    query = compressor.ln_q(compressor.query[:4] + compressor.pos_embed[:4]).expand(2, -1, -1)
    key = compressor.ln_k(positions).expand(2, -1, -1)
    expected = released(query, key, compressor.ln_v(image))[0] @ compressor.proj
    soft = compressor(image, torch.tensor([25, 25]), **costs((4, 0), (4, 0)), max_tokens=4)
    torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-5)


def test_the_released_size_has_the_released_names_and_count() -> None:
    with torch.device("meta"):
        compressor = Query(in_size=1024, out_size=4096, query_grid=(16, 16), feature_grid=(24, 24), num_heads=16)
    shapes = {name: tuple(parameter.shape) for name, parameter in compressor.named_parameters()}
    norms = {f"{norm}.{kind}": (1024,) for norm in ("ln_q", "ln_k", "ln_v") for kind in ("weight", "bias")}
    assert shapes == norms | {
        "query": (256, 1024),
        "pos_embed": (256, 1024),
        "attn.in_proj_weight": (3072, 1024),
        "attn.in_proj_bias": (3072,),
        "attn.out_proj.weight": (1024, 1024),
        "attn.out_proj.bias": (1024,),
        "proj": (1024, 4096),
    }
    assert sum(parameter.numel() for parameter in compressor.parameters()) == 8_923_136


@pytest.mark.parametrize("keys", ["position", "content"])
@torch.no_grad()
def test_an_item_in_a_mixed_batch_equals_the_item_alone(keys: str) -> None:
    """Different rates and lengths, whole windows of padding, NaN in it, and room for more tokens than anyone has."""
    compressor = stream_query(keys)
    batch, lengths = clips(21, 3, 16)
    budgets = [(12, 2), (2, 4), (2, 8)]
    together = compressor(batch, lengths, **costs(*budgets), max_tokens=30)
    assert together.shape == (3, 30, OUT)
    for row, (length, cost) in enumerate(zip(lengths.tolist(), budgets, strict=True)):
        alone = compressor(batch[row : row + 1, :length], lengths[row : row + 1], **costs(cost), max_tokens=cost[0])
        torch.testing.assert_close(together[row, : cost[0]], alone[0])
        assert not together[row, cost[0] :].any()


@torch.no_grad()
def test_images_of_one_batch_may_differ_in_count() -> None:
    compressor = image_query("content")
    images, lengths = torch.randn(2, 25, SIZE), torch.tensor([25, 25])
    together = compressor(images, lengths, **costs((9, 0), (2, 0)), max_tokens=40)
    assert together.shape == (2, 40, OUT)
    alone = compressor(images[1:], lengths[1:], **costs((2, 0)), max_tokens=2)
    torch.testing.assert_close(together[1, :2], alone[0])
    assert not together[1, 2:].any()


@pytest.mark.parametrize("compressor", [image_query("content"), stream_query("position")])
def test_every_weight_learns_also_from_windows_of_padding(compressor: Query) -> None:
    features, lengths = clips(25, 5) if compressor.windowed else (torch.randn(2, 25, SIZE), torch.tensor([25, 25]))
    compressor.zero_grad()
    soft = compressor(features, lengths, **costs((4, 8), (1, 8)), max_tokens=16)
    soft.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in compressor.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(grads[name].any() for name in ("query", "pos_embed", "proj", "attn.in_proj_weight"))


@torch.no_grad()
def test_a_process_without_the_medium_can_run_it() -> None:
    """No rate is known there; one token of one frame must come out finite."""
    soft = stream_query("content")(torch.zeros(1, 1, SIZE), torch.tensor([1]), **costs((1, 0)), max_tokens=1)
    assert soft.shape == (1, 1, OUT)
    assert soft.isfinite().all()


def test_reset_gives_the_released_start() -> None:
    compressor = image_query("position", in_size=64, query_grid=(8, 8), num_heads=1)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.fill_(7.0)
    compressor.reset_parameters()
    compressor.attn.reset_parameters()
    assert abs(compressor.query.std() - 0.02) < 0.002
    assert abs(compressor.proj.std() - OUT**-0.5) < 0.05
    assert torch.equal(compressor.pos_embed.detach(), sincos_positions((8, 8), 64, torch.device("cpu")))
    assert compressor.attn.in_proj_weight.abs().max() <= (6 / (4 * 64)) ** 0.5
    assert not compressor.attn.in_proj_bias.any()


def test_positions_tell_rows_from_columns() -> None:
    table = sincos_positions((3, 4), 16, torch.device("cpu")).unflatten(0, (3, 4))
    assert torch.equal(table[0, :, :8], table[2, :, :8]), "the first half depends on the column only"
    assert torch.equal(table[:, 0, 8:], table[:, 3, 8:]), "the second half depends on the row only"
    assert len(table.flatten(0, 1).unique(dim=0)) == 12
    torch.testing.assert_close(table[1, 2, 0], torch.tensor(2.0).sin())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": "both"}, "keys='both' is not one of: position, content"),
        (
            {"keys": "position", "num_heads": 3},
            "the size 16 of queries must be a multiple of 4 and of compressor.num_heads=3",
        ),
        ({"keys": "position", "size": 18, "num_heads": 2}, "the size 18 of queries must be a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_query(**changes)


def test_attention_over_a_mask_ignores_what_is_masked() -> None:
    attention = CrossAttention(size=8, num_heads=2)
    query, states = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(attention(query, states, states, mask), attention(query, states[:, :3], states[:, :3]))


def read_image(compressor: Query, images: Tensor, *counts: int) -> Tensor:
    lengths = torch.full((len(images),), images.shape[1])
    return compressor(images, lengths, **costs(*((count, 0) for count in counts)), max_tokens=max(counts) + 2)


def sharp_query(**changes) -> Query:
    """Every weight far from its initial value, so that whatever is left out of the fold shows."""
    compressor = image_query("position", **changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return compressor


@pytest.mark.parametrize("changes", [{}, {"size": 24}, {"num_heads": 1}, {"feature_grid": (3, 3)}])
@pytest.mark.parametrize("counts", [(1, 2), (9, 4)])
def test_folded_queries_equal_those_that_are_not(changes: dict, counts: tuple[int, int]) -> None:
    """Both orders of the products (few tokens, many tokens), heads, sizes and a grid without resizing."""
    compressor = sharp_query(**changes)
    length = compressor.feature_grid[0] * compressor.feature_grid[1]
    images = 3 * torch.randn(2, length, SIZE, generator=torch.Generator().manual_seed(3)) + 1
    unfolded = read_image(compressor, images, *counts).detach()
    with torch.no_grad():
        folded = read_image(compressor, images, *counts)
    assert not torch.equal(folded, unfolded)  # it really took another way
    torch.testing.assert_close(folded, unfolded, rtol=1e-5, atol=1e-5 * float(unfolded.abs().max()))


def test_which_product_comes_first_is_what_costs_less() -> None:
    assert pools_first(16, num_heads=16, length=576, size=1024)
    assert not pools_first(256, num_heads=16, length=576, size=1024)
    assert pools_first(256, num_heads=1, length=576, size=1024)


@torch.no_grad()
def _step(compressor: Query) -> None:
    compressor.attn.out_proj.weight.add_(0.5)


def _load(compressor: Query) -> None:
    compressor.load_state_dict({name: value + 0.3 for name, value in compressor.state_dict().items()})


def _assign(compressor: Query) -> None:
    other = {name: value - 0.2 for name, value in compressor.state_dict().items()}
    compressor.load_state_dict(other, assign=True)


def _train(compressor: Query) -> None:
    compressor.train()
    optimizer = torch.optim.SGD(compressor.parameters(), lr=0.1)
    with torch.enable_grad():
        read_image(compressor, torch.randn(1, 25, SIZE), 9).square().sum().backward()
    optimizer.step()
    compressor.eval()


def _write_data(compressor: Query) -> None:
    compressor.train()
    compressor.query.data.mul_(3)  # a norm follows: one number added to all would change nothing
    compressor.eval()


def _replace(compressor: Query) -> None:
    compressor.proj = nn.Parameter(compressor.proj + 1)


@pytest.mark.parametrize("change", [_step, _load, _assign, _train, _write_data, _replace, Query.double])
def test_folded_constants_are_never_stale(change) -> None:
    compressor = sharp_query()
    images = torch.randn(1, 25, SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = read_image(compressor, images, 9)
        kept = compressor._folds._kept
        torch.testing.assert_close(read_image(compressor, images, 9), before)
        assert compressor._folds._kept is kept  # folded once
    change(compressor)
    typed_images = images.to(compressor.proj.dtype)
    expected = read_image(compressor, typed_images, 9).detach()
    with torch.no_grad():
        after = read_image(compressor, typed_images, 9)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert after.dtype != before.dtype or not torch.allclose(after, before)


def test_copies_fold_for_themselves_and_gradients_are_not_folded() -> None:
    compressor = sharp_query()
    images = torch.randn(1, 25, SIZE)
    with torch.no_grad():
        read_image(compressor, images, 9)
    twin = copy.deepcopy(compressor)
    assert twin._folds._kept is None
    assert set(twin.state_dict()) == set(compressor.state_dict())
    read_image(compressor, images, 9).sum().backward()
    assert compressor.query.grad is not None
    assert compressor.attn.in_proj_weight.grad.abs().sum() > 0


@torch.no_grad()
def test_key_positions_are_bit_equal_whichever_way_torch_resizes_the_table() -> None:
    """How a table lies in memory says which kernel resizes it, and must not change what it gives."""
    compressor = image_query("position", query_grid=(16, 16), feature_grid=(24, 24))
    table = compressor.pos_embed.unflatten(0, (16, 16)).permute(2, 0, 1)[None]  # a batch axis without a stride
    resized = functional.interpolate(table, size=(24, 24), mode="bicubic", align_corners=False)
    assert compressor.key_positions().equal(resized[0].flatten(1).T)
