"""Lips that a budget leaves out: the answer is that about the sound alone, and nothing is read or encoded for them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny

from mllm.budget import Budget
from mllm.evaluation.flops import row_cost
from mllm.inference.answerer import Answer, Answerer, Decoding
from mllm.processing.batch import Batch
from mllm.processing.processor import LoadedMedia
from mllm.router.heads import Heads, Reduction
from mllm.router.router import MediaRouter, OperatingPoint, Router

CONFIG = tiny.settings(("audio", "video"), video={"budgets": ["/2", "/5", "none"]})
SOUND, LIPS, BOTH = (Budget.parse(text) for text in ("audio=/4", "audio=/4,video=none", "audio=/4,video=/2"))
TEXT = "transcribe speech and video to text."


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(tiny.model(CONFIG, seed=1), tiny.processor(CONFIG), Decoding(max_new_tokens=6))


def audio(length: int, seed: int, snr_db: float = 40.0) -> LoadedMedia:
    return dataclasses.replace(tiny.random_media("audio", length, seed=seed), estimated_snr_db=snr_db)


def clips(answerer: Answerer, snrs_db: list[float], *, with_video: bool = True) -> Batch:
    rows: list[Any] = []
    for seed, snr_db in enumerate(snrs_db):
        lips = [tiny.random_media("video", 20, seed=seed)] if with_video else []
        rows.append(([audio(40, seed, snr_db), *lips, TEXT], "yes"))
    return tiny.batch(answerer.processor, rows)


def test_the_answer_is_that_about_the_sound_alone(answerer: Answerer) -> None:
    sound = answerer.answer_batch(clips(answerer, [40.0, 40.0], with_video=False), [[SOUND] * 2])[0]
    batch = clips(answerer, [40.0, 40.0])
    together = answerer.answer_batch(batch, [[LIPS] * 2, [BOTH, LIPS]])
    for answer, expected in zip(together[0], sound, strict=True):
        assert answer.tokens == {"audio": 10, "video": 0}
        assert (answer.text, answer.num_prompt_tokens) == (expected.text, expected.num_prompt_tokens)
        assert answer.min_probability == pytest.approx(expected.min_probability, rel=1e-5)
        assert answer.is_trained
    assert together[1][1].text == sound[1].text
    assert together[1][0].tokens == {"audio": 10, "video": 10}
    alone = answerer.answer_batch(clips(answerer, [40.0]), [[BOTH]])[0][0]
    assert (alone.text, alone.tokens) == (together[1][0].text, together[1][0].tokens)
    row = batch.rows[0]
    costs = [
        row_cost(
            answerer.model,
            row,
            row.token_counts(budget, answerer.processor.space),
            frame_pixels=[(0, 0), (32, 32)],
            num_prompt_tokens=30,
            num_new_tokens=1,
        )
        for budget in (LIPS, BOTH)
    ]
    assert costs[0] is not None
    assert costs[1] is not None
    assert costs[0].encoder < costs[1].encoder, "lips that are left out are not encoded"


def noise_router() -> Router:
    """A router that reads lips where the sound is noisy."""
    noise = Reduction(np.array([20.0]), np.array([[1.0]]))
    heads = Heads({"noise": noise}, np.array([[0.0, 0.0], [1.0, -1.0]]), np.zeros((2, 3, 2)), 0.1)
    one = MediaRouter((LIPS, BOTH), heads, (OperatingPoint(0.0, 0, 10.0, 1.0),), 4, ("a", "b"))
    return Router({("audio", "video"): one}, {})


def test_lips_are_read_where_it_is_noisy_and_encoded_only_then(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = dataclasses.replace(answerer, router=noise_router(), max_growths=0)
    auto = Budget.parse("auto,price=0.001")
    encoded: list[str] = []
    encode = answerer.model.model.encode
    monkeypatch.setattr(
        answerer.model.model, "encode", lambda medium, *rest: (encoded.append(medium), encode(medium, *rest))[1]
    )

    def ask(snrs_db: list[float]) -> list[Answer]:
        encoded.clear()
        return routed.answer_batch(clips(answerer, snrs_db), [[auto] * len(snrs_db)])[0]

    assert [answer.budget for answer in ask([40.0, 35.0])] == [LIPS, LIPS]
    assert encoded == ["audio"]
    answers = ask([40.0, 5.0])
    assert [answer.budget for answer in answers] == [LIPS, BOTH]
    assert sorted(encoded) == ["audio", "video"]
    fixed = answerer.answer_batch(clips(answerer, [40.0, 5.0]), [[LIPS, BOTH]])[0]
    assert answers == fixed
