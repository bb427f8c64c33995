"""Images of hosts that keep their shape: grids, positions in three dimensions, and prompts read in parts."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hosts
import torch
from PIL import Image

import mllm
from mllm.budget import Amount, Budget, Extent, Space, TokenCount
from mllm.budget.tiling import map_of
from mllm.checkpoints.build import build
from mllm.checkpoints.load import save_run
from mllm.config.model import ModelConfig
from mllm.config.reading import read
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.hosts.positions import PlacedImage, look_up, position_table, row_positions
from mllm.hosts.rows import RowBreaks, in_rows, row_sizes, without_breaks
from mllm.inference.answerer import Answerer
from mllm.inference.decoding import Decoding
from mllm.kv_cache.names import cache_argument
from mllm.model.trainables import set_trainables
from mllm.processing.batch import EncodedSample, MediaSpan, num_prompt_tokens
from mllm.processing.media_inputs import HostView
from mllm.serving.answering import AnswerRules, AnswerRun
from mllm.serving.engine import Engine
from mllm.serving.media_cache import MediaItem
from mllm.serving.preparation import CountedSample, PromptRow
from mllm.training.step import prepare_packing

FAST = ["qwen3_vl"]
FAMILIES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny_hosts.KEEP_SHAPE
    if name not in tiny_hosts.MIXTURES
]
GRID_POSITIONS = [
    name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.slow)
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
]
SIZES = ((30, 40), (64, 24), (24, 64))


def expanded(processor: Any, raws: list[list[Image.Image]], budgets: list[str], *, left: bool = True) -> Any:
    """Inputs of one padded batch: a row per list of images, each at its budget."""
    loaded = [[processor.transform("image", raw) for raw in row] for row in raws]
    samples = [
        Sample(f"row{number}", (Message("user", (*[Media("image", "x")] * len(row), Text("what?"))),), task="test")
        for number, row in enumerate(raws)
    ]
    batch = processor.batch(samples, loaded, for_training=False)
    return processor.expand(batch, [[Budget.parse(budget) for budget in budgets]], left_padding=left).inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_different_shapes_and_budgets_share_a_batch_and_answer_as_alone(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    images = [tiny_hosts.image(*size, seed=seed) for seed, size in enumerate(SIZES)]
    rows, budgets = [[images[0]], [images[1], images[2]], [images[2]]], ["", "image=/4", "image=3"]
    together = expanded(processor, rows, budgets)
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        alone = [
            model(**expanded(processor, [row], [budget])).logits[0, -1]
            for row, budget in zip(rows, budgets, strict=True)
        ]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_pixels_show_most_at_the_soft_token_of_their_place(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    height, width = (30, 40)
    rows, columns = processor.host(tiny_hosts.image(height, width)).grid
    cells, grids = [divmod(cell, columns) for cell in range(rows * columns)], torch.tensor([[rows, columns]])
    down, across = height / rows, width / columns
    change = torch.zeros(len(cells), len(cells))
    for seed in range(4):  # attention of random weights spreads a change too, to other places in every image
        plain = np.asarray(tiny_hosts.image(height, width, seed=seed))
        images = [plain]
        for row, column in cells:
            images.append(plain.copy())
            top, left = round(row * down), round(column * across)
            part = images[-1][top : round(top + down), left : round(left + across)]
            part[:] = 255 - part
        values = torch.stack([processor.host(Image.fromarray(image)).values for image in images])
        with torch.no_grad():
            soft = model.model.encode("image", values, grids.expand(len(images), -1)).values
        change += (soft[1:] - soft[:1]).norm(dim=-1)
    change /= change.mean(dim=0)  # some soft tokens are moved by anything
    assert change.argmax(dim=1).tolist() == list(range(len(cells)))


@pytest.mark.parametrize("family", GRID_POSITIONS)
def test_positions_at_full_are_those_of_the_host(adopted: Any, family: str) -> None:
    _model, processor, host = adopted(family)
    images = [tiny_hosts.image(*size) for size in SIZES]
    inputs = expanded(processor, [images[:2], images[2:]], ["", ""], left=False)
    mask = inputs["attention_mask"]
    grids = [processor.host(image).grid for image in images]
    theirs, deltas = host.model.get_rope_index(
        input_ids=inputs["input_ids"],
        mm_token_type_ids=(inputs["input_ids"] == processor.host.placeholder_id).long(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids]),
        attention_mask=mask,
    )
    numbers = mask.cumsum(dim=1) - 1
    ours = look_up(inputs["prompt_positions"], numbers)
    assert torch.equal(ours[:, mask.bool()], theirs[:, mask.bool()])
    behind = mask.sum(dim=1, keepdim=True) + 5
    assert torch.equal(look_up(inputs["prompt_positions"], behind)[0], behind + deltas)


def on_grids(processor: Any) -> Any:
    """The same processor, whose pooled tokens stand as those of a small image."""
    other = copy(processor)
    space = processor.space.media["image"]
    other.space = Space({"image": replace(space, whole_maps=True)})
    return other


@pytest.mark.parametrize("family", GRID_POSITIONS)
def test_on_grids_pooled_tokens_stand_as_the_host_has_those_of_an_image_that_small(adopted: Any, family: str) -> None:
    model, original, host = adopted(family)
    processor = on_grids(original)
    images = [tiny_hosts.image(*size) for size in SIZES]
    rows = [images[:2], images[2:]]
    assert torch.equal(*(expanded(one, rows, ["", ""])["prompt_positions"] for one in (original, processor)))
    inputs = expanded(processor, rows, ["image=/4", "image=6"], left=False)
    mask, space = inputs["attention_mask"], processor.space.media["image"]
    shown = [
        map_of(space.count(Amount.parse(amount), Extent("image", grid=grid)).tokens, grid)
        for amount, grid in zip(("/4", "/4", "6"), (processor.host(image).grid for image in images), strict=True)
    ]
    theirs, deltas = host.model.get_rope_index(
        input_ids=inputs["input_ids"],
        mm_token_type_ids=(inputs["input_ids"] == processor.host.placeholder_id).long(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in shown]),
        attention_mask=mask,
    )
    ours = look_up(inputs["prompt_positions"], mask.cumsum(dim=1) - 1)
    assert torch.equal(ours[:, mask.bool()], theirs[:, mask.bool()])
    behind = mask.sum(dim=1, keepdim=True) + 5
    assert torch.equal(look_up(inputs["prompt_positions"], behind)[0], behind + deltas)
    # A token that is written later goes on from there, with a cache as without one.
    cached, whole = tiny_hosts.cached_and_whole(model, expanded(processor, [images[:1]], ["image=/4"]))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=2e-4)


def test_on_grids_a_count_is_a_whole_map_and_a_rate_the_largest_within_it(adopted: Any) -> None:
    space = on_grids(adopted("qwen3_vl")[1]).space.media["image"]
    for tokens in (5, 7, 11):
        message = f"^image={tokens} cannot be met: {tokens} tokens of 4 x 6 features form no map of equal rows; those "
        with pytest.raises(ValueError, match=message):
            space.count(Amount.parse(str(tokens)), Extent("image", grid=(4, 6)))
    assert space.count(Amount.parse("6"), Extent("image", grid=(4, 6))).tokens == 6
    for grid in [(4, 6), (5, 7), (15, 19), (40, 31), (44, 23), (3, 50)]:
        for rate in (1, 2, 4, 16):
            extent = Extent("image", grid=grid)
            if extent.length < rate:
                continue
            tokens = space.count(Amount.parse(f"/{rate}"), extent).tokens
            rows, columns = map_of(tokens, grid)
            assert rows * columns == tokens <= extent.length // rate
            assert tokens > extent.length // rate - 2 * max(rows, columns)  # short by about a row


def test_where_pooled_tokens_stand_is_a_setting_that_is_kept(tmp_path: Path) -> None:
    folder = tiny_hosts.write("qwen2_vl", tmp_path / "host")
    block = {"budgets": ["/1", "/4"], "positions": "grid"}
    adapter = {"kind": "gated_lora", "rank": 2, "alpha": 4}
    model, processor = build(read(ModelConfig, {"host": folder, "image": block, "adapter": adapter}, path="model"))
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    raw = tiny_hosts.image(64, 24)
    inputs = [tiny_hosts.inputs(one, [raw], "image=/4") for one in (processor, mllm.load(tmp_path / "run")[1])]
    assert torch.equal(inputs[0]["prompt_positions"], inputs[1]["prompt_positions"])
    for budget, most in (("image=/4", None), ("image=/4,image<=9", 9)):  # of what is seen, if that is less too
        extent, ours = processor.image_extent((64, 24)), tiny_hosts.inputs(processor, [raw], budget)
        count = processor.space.media["image"].count(Amount.parse("/4"), extent, max_image_tokens=most)
        rows, columns = map_of(count.tokens, extent.grid if count.resolution is None else count.resolution.grid)
        _, down, across = ours["prompt_positions"][0, (ours["input_ids"] == processor.host.placeholder_id)[0]].T
        assert (int(down.max() - down.min()), int(across.max() - across.min())) == (rows - 1, columns - 1)
    other = tiny_hosts.write("llava", tmp_path / "llava")
    with pytest.raises(
        ValueError,
        match=r"^model\.image\.positions is grid, but those of a llava have one dim.* in qwen2_vl, ",
    ):
        build(read(ModelConfig, {"host": other, "image": {"budgets": [36, 4], "positions": "grid"}}, path="model"))
    with pytest.raises(ValueError, match=r"^model\.image\.positions is grid, which goes with model\.host alone$"):
        read(ModelConfig, {"llm": "y", "image": {"encoder": "z", "budgets": [4], "positions": "grid"}}, path="model")


def test_a_pooled_token_stands_at_the_mean_of_its_patches_and_moves_no_text() -> None:
    text, image = [5, 6, 7], [9] * 24
    full = row_positions([*text, *image, 8, 8], 9, [PlacedImage((4, 6), 24)])
    assert full[3:27, 1].view(4, 6)[:, 0].tolist() == [3, 4, 5, 6]
    assert full[27:].tolist() == [[9] * 3, [10] * 3]
    pooled = row_positions([*text, *image[:6], 8, 8], 9, [PlacedImage((4, 6), 6)])
    blocks = full[3:27].view(2, 2, 3, 2, 3).float().mean(dim=(1, 3)).floor().long().flatten(0, 1)
    assert torch.equal(pooled[3:9], blocks)
    assert torch.equal(pooled[9:], full[27:])
    for count in range(1, 25):
        odd = row_positions([*text, *image[:count], 8], 9, [PlacedImage((4, 6), count)])
        assert odd[-1].tolist() == [9] * 3
        assert (odd[3:-1] >= full[3]).all()
        assert (odd[3:-1] <= full[26]).all()


def test_a_table_of_several_rows_counts_on_behind_each() -> None:
    short = row_positions([5, 9, 9, 9, 9, 5], 9, [PlacedImage((2, 2), 4)])
    long = row_positions([5] * 8, 9, [])
    table = position_table([short, long])
    numbers = torch.tensor([[5, 6, 8], [5, 6, 8]])
    for dimension in look_up(table, numbers):
        assert dimension.tolist() == [[3, 4, 6], [5, 6, 8]]
    one = short[-1:] - (len(short) - 1)
    assert torch.equal(look_up(one[None], numbers[:1]), look_up(short[None], numbers[:1]))


@pytest.mark.parametrize("family", GRID_POSITIONS)
def test_questions_about_one_image_are_answered_as_alone(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    answerer = Answerer(model, processor, decoding=Decoding(max_new_tokens=6))
    image, texts = tiny_hosts.image(64, 24), ["what is this?", "what?", "what is the colour of it?"]
    together = answerer.answer_questions(texts, image=image, budget="image=/4")
    assert (min(answer.num_shared_tokens for answer in together) > 0) == processor.shares_beginnings
    alone = [answerer(text, image=image, budget="image=/4") for text in texts]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


@pytest.mark.slow
def test_prompts_of_linear_attention_are_never_read_in_parts(adopted: Any) -> None:
    model, processor, _host = adopted("qwen3_5")
    inputs = expanded(processor, [[tiny_hosts.image(64, 24)]], ["image=/4"])
    reason = "its layers of linear attention keep one state of all they have read$"
    with pytest.raises(ValueError, match=f"^prompts of this host cannot be read in parts: {reason}"):
        model.read_prompts(**inputs)
    with pytest.raises(ValueError, match=f"and those of this qwen3_5 cannot be: {reason}"):
        Engine(model, processor)
    with pytest.raises(ValueError, match="the prompts of this host cannot be read in parts"):
        Answerer(model, processor, constant_prompt=True)
    names = {name.rsplit(".", 2)[1] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert names == {"q_proj", "v_proj"}  # of the layer of full attention alone


@pytest.mark.parametrize("family", [name for name in GRID_POSITIONS if "qwen3_5" not in str(name)])
def test_an_answer_goes_on_from_what_was_read_with_a_table_of_one_entry(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    inputs = expanded(processor, [[tiny_hosts.image(64, 24)], [tiny_hosts.image(30, 40)]], ["image=/4", "image=/16"])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    whole = model.generate(**inputs, **options)
    cache, _ = model.read_prompts(**inputs)
    table = inputs["prompt_positions"]
    behind = {"prompt_positions": table[:, -1:] - (table.shape[1] - 1), "scale_ids": inputs["scale_ids"]}
    rows = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    later = model.generate(**rows, **behind, **cache_argument(cache), **options)
    width = rows["input_ids"].shape[1]
    assert torch.equal(later[:, width:], whole[:, width:])


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava_onevision"])
def test_a_server_writes_an_answer_that_was_interrupted_as_without_a_pause(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    engine = Engine(model, processor)
    budget = Budget.parse("image=/4" if family == "qwen3_vl" else "image=4")
    rules = AnswerRules(6, ignores_end=True)
    runs = [AnswerRun(prompt(processor, tiny_hosts.image(*size), budget), rules) for size in SIZES]
    while any(run.ending is None for run in runs):
        engine.write([run for run in runs if run.ending is None], lambda steps, rows: steps >= 2)
    for run, size in zip(runs, SIZES, strict=True):
        inputs = expanded(processor, [[tiny_hosts.image(*size)]], [str(budget)])
        whole = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert run.ids == whole[0, inputs["input_ids"].shape[1] :].tolist()


def prompt(processor: Any, raw: Image.Image, budget: Budget) -> PromptRow:
    """A prompt about an image as a server prepares it."""
    loaded = processor.transform("image", raw)
    sample = Sample("row", (Message("user", (Media("image", "x"), Text("what?"))),), task="test")
    row = processor.batch([sample], [[loaded]], for_training=False).rows[0]
    counts = row.token_counts(budget, processor.space)
    counted = CountedSample(row.sample_id, row.ids, row.labels, row.spans, row.task, counted=tuple(counts))
    item = MediaItem(loaded, processor.extent(loaded))
    return PromptRow(counted, (item,), ("x",), num_prompt_tokens(row, counts))


def test_rows_of_pooled_tokens_have_a_break_behind_each_as_those_of_the_host() -> None:
    breaks = RowBreaks(7, 8)
    full = [5, *[9, 9, 9, 7] * 3, 9, 9, 9, 8, 6]
    ids, found = without_breaks(full, 9, (4, 3))
    assert (ids, found) == ([5, 9, 6], breaks)
    for tokens in range(1, 13):
        assert sum(row_sizes((4, 3), tokens)) == tokens
    shown, sizes = in_rows(9, (4, 3), 12, breaks)
    assert (shown, sizes) == ([9, 7, 9, 7, 9, 7, 9, 8], [3, 3, 3, 3])
    assert in_rows(9, (4, 3), 1, breaks) == ([9, 8], [1])
    with pytest.raises(ValueError, match="no 4 rows of 3 soft tokens with a break behind each"):
        without_breaks([5, *[9, 9, 9, 7] * 2, *[9, 9, 7, 9], 9, 9, 9, 8, 6], 9, (4, 3))
    with pytest.raises(ValueError, match="fewer ids than 4 rows of 3 soft tokens have"):
        without_breaks(full[:-4], 9, (4, 3))


def test_tokens_of_text_between_rows_are_counted_at_every_budget() -> None:
    span = MediaSpan(Extent("image", grid=(4, 3)), 0, views=(HostView((5, 9, 6), breaks=RowBreaks(7, 8)),))
    row = EncodedSample("row", [4, 9, 4], [-100] * 3, (span,))
    for tokens in (12, 6, 1):
        count = TokenCount(tokens)
        laid_out = row.laid_out([count], frozenset({9}))
        length = len(laid_out.ids) - len(laid_out.counts) + sum(laid_out.counts)
        assert length == num_prompt_tokens(row, [count])
        assert sum(laid_out.counts) == tokens


def test_rows_of_hosts_that_cannot_be_packed_are_padded(adopted: Any) -> None:
    for family in ("qwen3_vl", "gemma3"):
        model, processor, _host = adopted(family)
        assert not prepare_packing(model, processor)


def test_images_that_keep_their_shape_take_rates_and_counts(adopted: Any) -> None:
    _model, processor, _host = adopted("qwen3_vl")
    space = processor.space.media["image"]
    extent = Extent("image", grid=(5, 7))
    assert space.count(Amount.parse("max"), extent).tokens == 35
    assert space.count(Amount.parse("/4"), extent).tokens == 8
    assert space.count(Amount.parse("5"), extent).tokens == 5
    with pytest.raises(ValueError, match="image=/36: an image of 35 features is too small, it would leave no token"):
        space.count(Amount.parse("/36"), extent)
