"""What the confidence of an answer promises: the probabilities that a plain pass over all of it gives its tokens."""

import math

import pytest
import tiny
import torch
from tiny_models import BUDGETS, ROWS

from mllm.budget import Budget
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.decoding import end_ids_of, generate_options, up_to_end
from mllm.inference.long_audio import Window, join_answers

CONFIG = tiny.settings()
DECODINGS = [Decoding(max_new_tokens=8), Decoding(3, 8), Decoding(max_new_tokens=8, temperature=1.5, seed=2)]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(tiny.model(CONFIG, seed=3), tiny.processor(CONFIG))


def reference(answerer: Answerer, row: tuple, budget: Budget) -> torch.Tensor:
    """Log-probabilities of the tokens of one answer, from one pass over prompt and answer."""
    model, processor, decoding = answerer.model, answerer.processor, answerer.decoding
    inputs = processor.expand(tiny.batch(processor, [row]), [[budget]], left_padding=True).inputs
    options = generate_options(model, processor, decoding)
    prompt = inputs["input_ids"]
    with torch.no_grad(), decoding.seeded():
        new = model.generate(**inputs, **options)[0, prompt.shape[1] :]
    new = new[: len(up_to_end(new.tolist(), end_ids_of(model, processor, decoding)))]
    whole = torch.cat([prompt, new[None]], dim=1)
    with torch.no_grad():
        logits = model(**inputs | {"input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
    logits = logits[0, prompt.shape[1] - 1 : -1].float()
    logits[:, model.config.unsaid_ids] = -torch.inf
    return logits.log_softmax(dim=-1).gather(1, new[:, None])[:, 0].double()


@pytest.mark.parametrize("decoding", DECODINGS, ids=["greedy", "beams", "sampled"])
def test_confidence_is_that_of_a_plain_pass(answerer: Answerer, decoding: Decoding) -> None:
    answerer = Answerer(answerer.model, answerer.processor, decoding)
    for row, budget in zip(ROWS, BUDGETS, strict=True):
        answer = answerer.answer_batch(tiny.batch(answerer.processor, [row]), [[budget]])[0][0]
        expected = reference(answerer, row, budget)
        assert answer.num_new_tokens == len(expected)
        assert answer.min_probability == pytest.approx(expected.min().exp().item(), rel=1e-4)
        assert answer.mean_log_probability == pytest.approx(expected.mean().item(), rel=1e-4)
        assert 0 < answer.min_probability < 1


@pytest.mark.parametrize("decoding", DECODINGS[:2], ids=["greedy", "beams"])
def test_batch_mates_do_not_change_a_confidence(answerer: Answerer, decoding: Decoding) -> None:
    answerer = Answerer(answerer.model, answerer.processor, decoding)
    together = answerer.answer_batch(tiny.batch(answerer.processor, ROWS), [BUDGETS])[0]
    for answer, row, budget in zip(together, ROWS, BUDGETS, strict=True):
        alone = answerer.answer_batch(tiny.batch(answerer.processor, [row]), [[budget]])[0][0]
        assert answer.min_probability == pytest.approx(alone.min_probability, rel=1e-4)
        assert answer.mean_log_probability == pytest.approx(alone.mean_log_probability, rel=1e-4)


def test_joined_windows_are_as_sure_as_the_least_sure_of_them(answerer: Answerer) -> None:
    parts = [
        answerer.answer_batch(tiny.batch(answerer.processor, [row]), [[budget]])[0][0]
        for row, budget in zip(ROWS[:2], BUDGETS[:2], strict=True)
    ]
    joined = join_answers([Window(0.0, 2.0, []), Window(1.0, 3.0, [])], parts)
    assert joined.min_probability == min(part.min_probability for part in parts)
    total = math.fsum(part.mean_log_probability * part.num_new_tokens for part in parts)
    assert joined.mean_log_probability * joined.num_new_tokens == pytest.approx(total)
