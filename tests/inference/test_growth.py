"""What a growing prompt promises: the answers of prompts read whole, and that what is kept is not read again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny_models import LLMS, build

from mllm.budget import Budget
from mllm.config.model import LoraBankConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.growth import GrowingPrompt, grows
from mllm.media import InMemoryMedium
from mllm.model.encoding import encode_media
from mllm.processing.batch import Batch
from mllm.router.heads import Heads, Reduction
from mllm.router.router import MediaRouter, OperatingPoint, Router

QUERY = {"compressor": "query", "budgets": [2, 5, 16]}
HAAR = {"compressor": {"order": "haar"}, "budgets": [4, 16, 64]}
TILES = {"compressor": "query", "budgets": [2, 5, 16], "tiling": {"kind": "free", "max_tiles": 4, "merge": "flat"}}
POOL = {"budgets": [1, 4, 16]}


def make(image: dict[str, Any], *, adapter: Any = None, decoding: Any = None) -> Answerer:
    config = replace(tiny.settings(("image",), adapter=False, image=image), adapter=adapter)
    return Answerer(build(config, LLMS["llama"]), tiny.processor(config), decoding or Decoding(max_new_tokens=6))


def request(answerer: Answerer, num_images: int, budgets: Sequence[Budget]) -> Batch:
    """One question about images of different shapes, with text between them."""
    rng = np.random.default_rng(0)
    shapes = [(64 + 40 * number, 90, 3) for number in range(num_images)]
    in_memory = [InMemoryMedium("image", Image.fromarray(rng.integers(0, 255, shape, np.uint8))) for shape in shapes]
    parts = [part for number in range(num_images) for part in (Media("image", str(number)), Text("or"))]
    sample = Sample("a", (Message("user", (*parts, Text("how many objects?"))),), task="vqa")
    media = answerer.processor.load_media(sample, budgets=budgets, in_memory=in_memory)
    return answerer.processor.batch([sample], [media], for_training=False)


CASES = {
    "queries": (QUERY, 1, ("image=2", "image=5", "image=16")),
    "queries of two images": (QUERY, 2, ("image=2", "image=16")),
    "Haar order": (HAAR, 1, ("image=4", "image=64")),
    "tiles": (TILES, 1, ("image=2", "image=16")),
    "tiles of two images": (TILES, 2, ("image=2", "image=5")),
    "fewer tiles": (TILES, 1, ("image=2,tiles<=1", "image=5,tiles<=4")),
    "pooled": (POOL, 2, ("image=1", "image=16")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_grown_answer_is_that_of_the_prompt_read_whole(case: str, num_beams: int) -> None:
    image, num_images, texts = CASES[case]
    answerer = make(image, decoding=Decoding(num_beams, 6))
    budgets = [Budget.parse(text) for text in texts]
    batch = request(answerer, num_images, budgets)
    features = encode_media(answerer.model, batch.values, answerer.model.device)
    prompt = GrowingPrompt(answerer.model, answerer.processor, answerer.decoding, batch.rows[0], features)
    for budget in budgets:
        expected = answerer.answer_batch(batch, [[budget]])[0][0]
        answer = prompt.answer(budget)
        assert replace(answer, tokens=expected.tokens, num_kept_tokens=0) == expected
        assert answer.min_probability == pytest.approx(expected.min_probability, rel=1e-3)


@pytest.mark.parametrize("image", [QUERY, HAAR])
def test_every_row_of_a_batch_grows_as_it_would_alone(image: dict[str, Any]) -> None:
    answerer = make(image)
    budgets = [Budget.parse("image=4"), Budget.parse("image=16")]
    rows = [([tiny.random_media("image", seed=number), "how many objects?"], "two") for number in range(3)]
    together = tiny.batch(answerer.processor, rows)
    features = encode_media(answerer.model, together.values, answerer.model.device)
    for number, row in enumerate(rows):
        prompt = GrowingPrompt(answerer.model, answerer.processor, answerer.decoding, together.rows[number], features)
        alone = tiny.batch(answerer.processor, [row])
        for budget in budgets:
            answer, expected = prompt.answer(budget), answerer.answer_batch(alone, [[budget]])[0][0]
            assert replace(answer, tokens=expected.tokens, num_kept_tokens=0) == expected


def test_what_is_kept_is_not_read_again() -> None:
    answerer = make(QUERY)
    small, large = Budget.parse("image=2"), Budget.parse("image=16")
    for num_images, kept_soft in ((1, 2), (2, 2)):
        batch = request(answerer, num_images, [small])
        features = encode_media(answerer.model, batch.values, answerer.model.device)
        prompt = GrowingPrompt(answerer.model, answerer.processor, answerer.decoding, batch.rows[0], features)
        first = prompt.answer(small)
        assert (first.tokens, first.num_kept_tokens) == ({"image": 2 * num_images}, 0)
        lengths: list[int] = []
        handle = answerer.model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),  # noqa: B023
            with_kwargs=True,
        )
        second = prompt.answer(large)
        handle.remove()
        before_image = list(batch.rows[0].ids).index(answerer.processor.placeholder_ids["image"])
        assert second.num_kept_tokens == before_image + kept_soft
        assert second.tokens == {"image": 16 * num_images - kept_soft}
        # The last position of the prompt is read on its own, with the first token to come.
        assert lengths[:2] == [second.num_prompt_tokens - second.num_kept_tokens - 1, 1]
        timed = prompt.answer(small, timed=True).timing
        assert timed is not None
        assert min(timed.encoder_ms, timed.prefill_ms, timed.decode_ms) > 0


def test_an_expert_per_scale_keeps_nothing_and_is_right_all_the_same() -> None:
    scales = LoraBankConfig(variant="ss", rank=4, alpha=8)
    answerer = make(QUERY, adapter=scales)
    budgets = [Budget.parse("image=2"), Budget.parse("image=16")]
    batch = request(answerer, 1, budgets)
    features = encode_media(answerer.model, batch.values, answerer.model.device)
    prompt = GrowingPrompt(answerer.model, answerer.processor, answerer.decoding, batch.rows[0], features)
    answers = [prompt.answer(budget) for budget in budgets]
    assert [answer.num_kept_tokens for answer in answers] == [0, 0]
    assert [answer.text for answer in answers] == [
        answerer.answer_batch(batch, [[budget]])[0][0].text for budget in budgets
    ]


@pytest.mark.parametrize("num_images", [1, 2])
def test_auto_grows_and_bills_what_was_read(num_images: int) -> None:
    answerer = make(QUERY)
    assert grows(answerer.model, answerer.processor, answerer.decoding)
    assert not grows(answerer.model, answerer.processor, Decoding(static_cache=True))
    width = answerer.model.config.text_config.hidden_size
    question = Reduction(np.zeros(width), np.zeros((width, 1)))
    after = np.zeros((3, 3, 3))
    after[0, 0], after[1, 0] = (-4.0, 4.0, 0.0), (0.0, -4.0, 4.0)  # 2 tokens lead to 5, and those to 16
    heads = Heads({"question": question}, np.asarray([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), after, 0.1)
    budgets = tuple(Budget.parse(text) for text in ("image=2", "image=5", "image=16"))
    routed = MediaRouter(budgets, heads, (OperatingPoint(0.0, 2, 4.0, 1.0),), 1, ())
    answerer = replace(answerer, router=Router({("image",): routed}, {}))
    batch = request(answerer, num_images, budgets)
    answer = answerer.answer_batch(batch, [[Budget.parse("auto,price=0.001")]], timed=True)[0][0]
    assert [str(one.budget) for one in (*answer.discarded, answer)] == ["image=2", "image=5", "image=16"]
    # One image is read once; of two, what stands behind the first is read again each time.
    assert answer.tokens == {"image": 16 if num_images == 1 else 4 + (10 - 2) + (32 - 5)}
    assert answer.text == answerer.answer_batch(batch, [[budgets[2]]])[0][0].text
    assert answer.timing is not None
    assert answer.timing.prefill_ms > 0
