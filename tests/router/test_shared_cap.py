"""Under `auto,total<=N` every item of a medium has its own budget: the best of all splits, answered as if named."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny

from mllm.budget import Budget
from mllm.inference.answerer import Answerer, Decoding
from mllm.router.features import FACTS, facts_of
from mllm.router.heads import Heads, Reduction
from mllm.router.router import MediaRouter, OperatingPoint, Router

CONFIG = tiny.settings(("audio",), audio={"budgets": ["/4", "/8", "/16"]})
BUDGETS = tuple(Budget.parse(text) for text in ("audio=/16", "audio=/8", "audio=/4"))
POINTS = tuple(OperatingPoint(0.01, growths, 4.0, 1.0) for growths in (0, 2))


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    """An answerer whose router expects more of tokens the longer a clip is."""
    length = Reduction(np.array([np.log2(33), 1.0, 0.0]), np.array([[1.0], [0.0], [0.0]]))
    heads = Heads({FACTS: length}, np.array([[-1.0, 0.0, 0.5], [0.1, 0.7, 2.0]]), np.zeros((3, 3, 3)), 0.1)
    one = MediaRouter(BUDGETS, heads, POINTS, 4, ("a", "b"))
    made = Answerer(tiny.model(CONFIG, seed=2), tiny.processor(CONFIG), Decoding(max_new_tokens=4))
    return replace(made, router=Router({("audio",): one}, {}))


def clips(answerer: Answerer, *lengths: int):
    parts = [tiny.random_media("audio", length, seed=length) for length in lengths]
    return tiny.batch(answerer.processor, [([*parts, "what is said?"], "yes")])


@pytest.mark.parametrize("lengths", [(16, 48), (48, 16, 32), (20, 20, 20)])
@pytest.mark.parametrize("price", [0.0, 0.01, 0.05])
def test_it_is_the_best_of_all_splits(answerer: Answerer, lengths: tuple[int, ...], price: float) -> None:
    row = clips(answerer, *lengths).rows[0]
    assert answerer.router is not None
    heads = answerer.router.of(("audio",)).heads
    tokens = np.array([[length // rate for rate in (16, 8, 4)] for length in lengths])
    expected = [heads.predict_before({FACTS: facts_of([span])[None]})[0] for span in row.spans]
    for total in (tokens[:, 0].sum(), tokens[:, 0].sum() + 3, tokens[:, 1].sum(), tokens[:, 2].sum()):
        choice = answerer.chooser.choose(row, Budget.parse(f"auto,price={price},total<={total}"))
        counts = row.token_counts(choice.budgets[0], answerer.processor.space)
        spent = sum(count.tokens for count in counts)
        assert spent == choice.tokens[0] <= total
        reached = sum(
            expected[item][(16, 8, 4).index(count.rate)] - price * count.tokens for item, count in enumerate(counts)
        )
        splits = itertools.product(range(3), repeat=len(lengths))
        best = max(
            sum(expected[item][number] - price * tokens[item, number] for item, number in enumerate(split))
            for split in splits
            if sum(tokens[item, number] for item, number in enumerate(split)) <= total
        )
        assert reached == pytest.approx(best, abs=1e-12)


def test_the_answer_is_that_of_the_budget_that_names_every_item(answerer: Answerer) -> None:
    batch = clips(answerer, 16, 48)
    auto = Budget.parse("auto,price=0.01,total<=13")
    answer = answerer.answer_batch(batch, [[auto]])[0][0]
    assert str(answer.budget) == "audio=/16:/4"
    assert answer.tokens == {"audio": 13}
    assert answer.is_trained
    assert answer == answerer.answer_batch(batch, [[Budget.parse("audio=/16:/4")]])[0][0]
    assert answerer.chooser.choose(clips(answerer, 48).rows[0], auto).budgets == BUDGETS, "one item is routed as ever"
    with pytest.raises(ValueError, match="total<=3"):
        answerer.chooser.choose(batch.rows[0], Budget.parse("auto,price=0.01,total<=3"))
    # Without a router the old rule holds: one budget for all items, the most tokens win.
    alone = replace(answerer, router=None).answer_batch(batch, [[Budget.parse("total<=13")]])[0][0]
    assert alone.tokens == {"audio": 8}
