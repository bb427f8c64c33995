"""Images that a host sees smaller cost what their size says, and are answered as the host itself answers them then."""

from copy import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from PIL import Image

from mllm.budget import Budget, count_tokens
from mllm.budget.sampler import BudgetSampler
from mllm.budget.tiling import Size
from mllm.checkpoints import adoption
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.request_costs import ModelCosts
from mllm.hosts import HostProcessor
from mllm.hosts.resizing import RESIZING, HostResizing, resizing_of
from mllm.inference.answerer import Answerer, Decoding
from mllm.processing.processor import ElasticProcessor
from mllm.training.pipeline.dataset import extreme_budgets

FAST = ("idefics3", "internvl", "qwen3_vl")
FAMILIES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in RESIZING
    if name not in tiny_hosts.MIXTURES  # whose images are those of their families
]
SIZES = [(24, 24), (100, 100), (30, 40), (41, 29), (7, 300), (300, 7), (1, 90), (90, 1), (97, 55), (55, 98), (23, 25)]
"""Heights and widths in pixels, extreme ratios among them; a tile has 24 x 24."""


def roomy(processor: ElasticProcessor) -> ElasticProcessor:
    """The same processor, whose host sees images larger by default, as released ones do."""
    assert processor.host is not None
    assert processor.settings.host is not None
    values = processor.host.processor.image_processor.to_dict()
    for key, larger in LARGER.items():
        values |= larger if key in values or key == values["image_processor_type"] else {}
    roomy = copy(processor)
    kept = {**processor.settings.host, "preprocessor": values}
    roomy.host = HostProcessor(processor.host.config, kept, processor.tokenizer)
    roomy.space = processor.space.resized_by(roomy.host.resizing)
    return roomy


LARGER: dict[str, dict[str, Any]] = {
    "max_image_size": {"size": {"longest_edge": 120}},
    "max_patches": {"max_patches": 12},
    "merge_size": {"size": {"shortest_edge": 256, "longest_edge": 64 * 150}},
    "max_soft_tokens": {"max_soft_tokens": 280},
    "PixtralImageProcessor": {"size": {"longest_edge": 120}},
}
"""By a key of an image processor's that tells its kind, or its type."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_sees_what_the_size_says(adopted: Any, family: str) -> None:
    host = roomy(adopted(family)[1]).host
    seen = set()
    for size in SIZES:
        height, width = size
        image = Image.new("RGB", (width, height), (90, 120, 200))
        default = host.resizing.default(size)
        resolutions = set(host.resizing.resolutions(size))
        for resolution in resolutions:
            item = host(image, resolution)  # raises where the processor makes others
            assert item.tokens * item.num_placeholders == resolution.tokens
            seen.add(resolution.tokens)
        for most in range(min(one.tokens for one in resolutions), default.tokens, 7):
            chosen = host.resizing.at_most(size, most)
            assert chosen.tokens <= most
            assert host.resizing.at_most(size, chosen.tokens) == chosen
    assert len(seen) > 4, seen


def test_released_sizes_are_counted_as_their_processors_do() -> None:
    """The table of docs/adopt.md: InternVL's tiles of 448 pixels, up to 12 and the whole; SmolVLM's of 512 in an image
    made 2048 pixels long; and so on."""
    internvl = resizing_of(
        "internvl", {"size": {"height": 448, "width": 448}, "min_patches": 1, "max_patches": 12}, 256
    )
    smolvlm = resizing_of("smolvlm", {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, 64)
    assert internvl is not None
    assert smolvlm is not None
    full_hd = (1080, 1920)
    assert internvl.default(full_hd).tokens == 2304  # 4 x 2 tiles and the whole
    assert [internvl.at_most(full_hd, most).num_images for most in (2303, 768, 767)] == [3, 3, 1]
    assert smolvlm.default(full_hd).tokens == 13 * 64  # 4 x 3 tiles and the whole
    assert [smolvlm.at_most(full_hd, most).num_images for most in (832, 640, 400, 64)] == [13, 7, 5, 1]
    cohere = resizing_of("cohere2_vision", {"size": {"height": 512, "width": 512}, "max_patches": 12}, 256)
    assert cohere is not None
    assert tiles_of(cohere, full_hd) == [13, 9, 7, 5, 3, 1]
    assert tiles_of(internvl, full_hd) == [9, 3, 1]
    assert tiles_of(smolvlm, full_hd) == [13, 7, 5, 1]
    area = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}, "patch_size": 14, "merge_size": 2}
    qwen = resizing_of("qwen2_5_vl", area, 0)
    gemma = resizing_of("gemma4", {"pooling_kernel_size": 3, "patch_size": 16, "max_soft_tokens": 280}, 0)
    assert qwen is not None
    assert gemma is not None
    edge = {"size": {"longest_edge": 1540}, "patch_size": 14, "spatial_merge_size": 2}
    mistral = resizing_of("mistral3", edge, 0)
    assert mistral is not None
    assert (mistral.default(full_hd).tokens, mistral.at_most(full_hd, 256).tokens) == (1705, 252)
    with pytest.raises(ValueError, match=r"^image<=1 cannot be met: an image of 20 x 2000 pixels takes at least 4 "):
        mistral.at_most((20, 2000), 1)
    with pytest.raises(ValueError, match=r"^of an image of 1 x 2000 pixels nothing is left at 1540 pixels$"):
        mistral.default((1, 2000))
    assert (qwen.default(full_hd).tokens, qwen.at_most(full_hd, 256).tokens) == (2691, 252)
    assert [gemma.at_most(full_hd, most).tokens for most in (264, 263, 119)] == [264, 120, 66]
    with pytest.raises(ValueError, match=r"image<=63 cannot be met: an image of 1080 x 1920 pixels takes at least 64 "):
        smolvlm.at_most(full_hd, 63)


def tiles_of(resizing: HostResizing, image: Size) -> list[int]:
    """The numbers of encoded images there are, from the default down."""
    return sorted({one.num_images for one in resizing.resolutions(image)}, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resized_image_is_the_hosts_own_at_that_setting(adopted: Any, family: str) -> None:
    model, given, host = adopted(family)
    processor, image = roomy(given), tiny_hosts.image(100, 60)
    assert processor.host is not None
    default = processor.host.resizing.default((100, 60))
    resolution = processor.host.resizing.at_most((100, 60), default.tokens - 1)
    assert resolution.tokens < default.tokens
    budget = f"image<={resolution.tokens}"
    ours = tiny_hosts.inputs(processor, [image], budget)
    assert ours["scale_ids"].tolist() == [-1]  # it is the host's own answer, without the adapter
    keywords = processor.host.resizing.keywords(resolution.setting)
    theirs = adoption.host_inputs(processor, image, host, images_kwargs=keywords)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, host(**theirs).logits)
        reduced = tiny_hosts.inputs(processor, [image], f"image=4,{budget}")
        assert reduced["scale_ids"].tolist() == [0]
        assert reduced["num_image_tokens"].tolist() == [4] * resolution.num_images
        expected = host(**adoption.oracle_inputs(model, host, reduced, theirs)).logits
        with tiny_hosts.without_adapter(model):
            assert torch.equal(model(**reduced).logits, expected)


@pytest.mark.parametrize(
    ("family", "tokens"),
    [("idefics3", [45, 9, 20, 4]), pytest.param("qwen3_vl", [32, 8, 4, 4], marks=pytest.mark.slow)],
)
def test_resolutions_meet_in_one_batch_and_answer_as_alone(adopted: Any, family: str, tokens: list[int]) -> None:
    model, processor, _ = adopted(family)
    raws = [tiny_hosts.image(100, 60), tiny_hosts.image(60, 100, seed=1)]
    budgets = [Budget.parse(text) for text in ("", "image<=9", "image=4", "image=4,image<=9")]
    message = (Message("user", (Media("image", "x"), Text("what is this?"))),)
    samples = [Sample(f"row{number}", message, task="test") for number in range(2)]
    loaded = [[processor.transform("image", raw, budgets=budgets)] for raw in raws]
    batch = processor.batch(samples, loaded, for_training=False)
    answers = Answerer(model, processor, Decoding(max_new_tokens=5)).answer_batch(batch, [[one] * 2 for one in budgets])
    for budget, of_rows in zip(budgets, answers, strict=True):
        for raw, answer in zip(raws, of_rows, strict=True):
            alone = Answerer(model, processor, Decoding(max_new_tokens=5))(
                image=raw, text="what is this?", budget=str(budget)
            )
            assert (answer.text, answer.tokens) == (alone.text, alone.tokens)
    assert [of_rows[0].tokens["image"] for of_rows in answers] == tokens
    only = processor.batch(samples[:1], [[processor.transform("image", raws[0])]], for_training=False)
    with pytest.raises(
        ValueError, match=f"loaded at a resolution of its own, and its budget wants {tokens[1]} tokens: load media"
    ):
        processor.expand(only, [[budgets[1]]], left_padding=True)


def test_a_cap_on_all_media_goes_with_smaller_images(adopted: Any) -> None:
    _, processor, _ = adopted("idefics3")
    extent = processor.image_extent((100, 60))
    (count,) = count_tokens([extent], Budget.parse("image<=9,total<=5"), processor.space)
    assert (count.tokens, count.resolution.num_images) == (4, 1)
    with pytest.raises(
        ValueError, match=r"image<=8 cannot be met: an image of 100 x 60 pixels takes at least 9 tokens"
    ):
        count_tokens([extent], Budget.parse("image<=8"), processor.space)


def test_a_cap_in_flops_keeps_what_is_seen(adopted: Any) -> None:
    model, processor, _ = adopted("idefics3")
    costs = ModelCosts(model, processor)
    answerer = Answerer(model, processor, Decoding(max_new_tokens=3), request_costs=costs)
    raw = tiny_hosts.image(100, 60)
    capped = answerer(image=raw, text="what is this?", budget="flops<=1e15,image<=9")
    assert capped == answerer(image=raw, text="what is this?", budget="image=9,image<=9")
    assert capped.tokens == {"image": 9}


def test_random_budgets_let_a_host_see_images_smaller(adopted: Any) -> None:
    _, processor, _ = adopted("idefics3")
    sampler = BudgetSampler(processor.space, "sandwich", num_budgets=3, is_gated=True, max_image_tokens=(9,))
    steps = [[str(one.budget) for one in sampler(step)] for step in range(60)]
    assert {budgets[0] for budgets in steps} == {"image=9"}
    between = {"image=4", "image=1", "image=4,image<=9", "image=1,image<=9"}
    assert {budget for budgets in steps for budget in budgets[1:]} == between
    assert set(map(str, sampler.possible(["image"]))) == between | {"image=9"}
    loaded_at = ["image=9", "image=4,image<=9", "image=1,image<=9", "image=1"]
    assert [str(one) for one in extreme_budgets(sampler)] == loaded_at
    assert sampler.seen_at(9, ["audio"]) == []
    with pytest.raises(ValueError, match=r"^sampler\.max_image_tokens go with mode random or sandwich; mode is 'all'$"):
        BudgetSampler(processor.space, "all", max_image_tokens=(9,))
    with pytest.raises(
        ValueError, match=r"^sampler\.max_image_tokens are of random budgets, and .* leaves sandwich none"
    ):
        BudgetSampler(processor.space, "sandwich", num_budgets=2, max_image_tokens=(9,))
    with pytest.raises(ValueError, match=r"^sampler\.max_image_tokens: image<=9: this model sees no image smaller"):
        BudgetSampler(adopted("llava")[1].space, "random", max_image_tokens=(9,))


def test_a_host_that_sees_no_image_smaller_refuses(tmp_path: Path) -> None:
    folder = tiny_hosts.write("llava", tmp_path)
    _, processor = tiny_hosts.adopted(folder, "llava")
    with pytest.raises(ValueError, match=r"^image<=9: this model sees no image smaller; image=N pools what it sees$"):
        processor.space.check(Budget.parse("image<=9"))
    with pytest.raises(ValueError, match=r"image<=9: this model sees no image smaller"):
        tiny_hosts.inputs(processor, [tiny_hosts.image()], "image<=9")
