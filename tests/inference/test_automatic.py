"""What open budgets promise: an answer at a trained budget, chosen for one request alone, and all of it billed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_routers import image_router

from mllm.budget import Budget, count_tokens
from mllm.evaluation.flops import row_cost
from mllm.evaluation.request_costs import ModelCosts
from mllm.inference.answerer import Answer, Answerer, Decoding
from mllm.processing.batch import num_prompt_tokens
from mllm.router.certificate import Certificate, Promise
from mllm.router.router import Router

CONFIG = tiny.settings(("image", "audio"))
BUDGETS = tuple(Budget.parse(text) for text in ("image=1", "image=4", "image=16"))
QUESTIONS = ("what colour is the circle?", "how many objects?", "what is the letter here?", "is it left of it?")
ROWS = [([tiny.random_media("image", seed=number), text], "yes") for number, text in enumerate(QUESTIONS)]


def router(answerer: Answerer, *, gain_of_question: float = 6.0, growth: float = 0.0) -> Router:
    width = answerer.model.config.text_config.hidden_size
    return image_router(width, BUDGETS, gain_of_question=gain_of_question, growth=growth)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(tiny.model(CONFIG, seed=3), tiny.processor(CONFIG), Decoding(max_new_tokens=8))


def fixed(answerer: Answerer, number: int, budget: Budget) -> Answer:
    return answerer.answer_batch(tiny.batch(answerer.processor, [ROWS[number]]), [[budget]])[0][0]


def test_once_resolved_it_is_that_budget_alone_and_in_any_batch(answerer: Answerer) -> None:
    answerer = replace(answerer, router=router(answerer), max_growths=0)
    auto = Budget.parse("auto,price=0.001")
    together = answerer.answer_batch(
        tiny.batch(answerer.processor, ROWS), [[auto] * len(ROWS), [BUDGETS[0]] * len(ROWS)]
    )
    assert len({answer.budget for answer in together[0]}) > 1, "the questions ask for different budgets"
    same = answerer.answer_batch(
        tiny.batch(answerer.processor, ROWS), [[answer.budget for answer in together[0]], [BUDGETS[0]] * len(ROWS)]
    )
    for number, (answer, expected) in enumerate(zip(together[0], same[0], strict=True)):
        assert answer == expected
        assert (answer.min_probability, answer.mean_log_probability) == (
            expected.min_probability,
            expected.mean_log_probability,
        )
        alone = answerer.answer_batch(tiny.batch(answerer.processor, [ROWS[number]]), [[auto]])[0][0]
        assert alone == fixed(answerer, number, alone.budget) == replace(answer, num_shared_tokens=0)
        assert alone.min_probability == fixed(answerer, number, alone.budget).min_probability
        assert answer.budget in BUDGETS
        assert answer.is_trained


def confidences_of(answerer: Answerer) -> list[float]:
    """How sure each question's answer at the smallest budget is."""
    return [fixed(answerer, number, BUDGETS[0]).min_probability for number in range(len(ROWS))]


def growing_half(answerer: Answerer) -> Answerer:
    """An answerer at which all questions begin at the smallest budget, and the less confident half goes on."""
    confidences = sorted(confidences_of(answerer))
    # Logits of the confidence below 0 speak for more tokens; shift the bias so that half of the questions grow.
    middle = float(np.log(confidences[1] / (1 - confidences[1])) + np.log(confidences[2] / (1 - confidences[2]))) / 2
    routed = router(answerer, gain_of_question=0.0, growth=3.0)
    one = routed.by_media[("image",)]
    after = one.heads.after.copy()
    after[:, 0] = [-3.0 * middle, 0.0, 3.0 * middle]
    shifted = replace(one, heads=replace(one.heads, after=after))
    return replace(answerer, router=replace(routed, by_media={("image",): shifted}))


def test_growing_reads_again_at_the_chosen_budget_and_bills_everything(answerer: Answerer) -> None:
    answerer = growing_half(answerer)
    calls = []
    handle = answerer.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answers = answerer.answer_batch(tiny.batch(answerer.processor, ROWS), [[Budget.parse("auto,price=0")] * len(ROWS)])[
        0
    ]
    handle.remove()
    assert len(calls) == 1, "features serve every budget"
    grown = [answer for answer in answers if answer.discarded]
    assert 0 < len(grown) < len(answers)
    for number, answer in enumerate(answers):
        said = (*answer.discarded, answer)
        for one_said in said:
            expected = fixed(answerer, number, one_said.budget)
            assert (one_said.text, one_said.num_new_tokens) == (expected.text, expected.num_new_tokens)
        assert str(said[0].budget) == "image=1"
        assert answer.tokens["image"] == sum(int(one_said.budget.amounts["image"].value) for one_said in said)
        alone = answerer.answer_batch(tiny.batch(answerer.processor, [ROWS[number]]), [[Budget.parse("auto,price=0")]])
        assert alone[0][0] == answer


@pytest.mark.parametrize("grow_first", [True, False])
def test_any_rows_of_a_batch_may_be_those_that_go_on(answerer: Answerer, grow_first: bool) -> None:
    order = np.argsort(confidences_of(answerer))[:: 1 if grow_first else -1].tolist()
    answerer, auto = growing_half(answerer), Budget.parse("auto,price=0")
    batch = tiny.batch(answerer.processor, [ROWS[number] for number in order])
    answers = answerer.answer_batch(batch, [[auto] * len(order)])[0]
    assert [bool(answer.discarded) for answer in answers] == [
        number < 2 if grow_first else number >= 2 for number in range(4)
    ]
    for number, answer in zip(order, answers, strict=True):
        assert answer == answerer.answer_batch(tiny.batch(answerer.processor, [ROWS[number]]), [[auto]])[0][0]


def test_caps_leave_out_what_is_above_them(answerer: Answerer) -> None:
    answerer = replace(answerer, router=router(answerer), max_growths=0)
    batch = tiny.batch(answerer.processor, ROWS)
    for cap, most in (("total<=4", 4), ("total<=15", 4), ("total<=16", 16)):
        answers = answerer.answer_batch(batch, [[Budget.parse(f"auto,price=0,{cap}")] * len(ROWS)])[0]
        assert max(answer.tokens["image"] for answer in answers) == most
    two = tiny.batch(answerer.processor, [([*ROWS[0][0][:1], *ROWS[1][0]], "yes")])
    with pytest.raises(ValueError, match=r"budget 'auto,total<=1' cannot be met: image=1 takes 2 soft tokens"):
        answerer.answer_batch(two, [[Budget.parse("auto,total<=1")]])


def test_caps_in_other_units_take_the_dearest_trained_budget_below(answerer: Answerer) -> None:
    answerer = replace(answerer, request_costs=ModelCosts(answerer.model, answerer.processor))
    batch = tiny.batch(answerer.processor, ROWS[:1])
    row, space = batch.rows[0], answerer.processor.space
    costs = {}
    for budget in BUDGETS:
        counts = row.token_counts(budget, space)
        cost = row_cost(
            answerer.model,
            row,
            counts,
            frame_pixels=[(0, 0)],
            num_prompt_tokens=num_prompt_tokens(row, counts),
            num_new_tokens=1,
        )
        assert cost is not None
        costs[str(budget)] = cost
    for unit, value in (("flops", "total"), ("kv_bytes", "kv_bytes")):
        dearest = getattr(costs["image=4"], value)
        for most, expected in ((dearest, "image=4"), (dearest - 1, "image=1"), (10 * dearest, "image=64")):
            answer = answerer.answer_batch(batch, [[Budget.parse(f"{unit}<={most}")]])[0][0]
            assert str(answer.budget) == expected
            assert answer == answerer.answer_batch(batch, [[Budget.parse(expected)]])[0][0]
        with pytest.raises(
            ValueError, match=rf"sample 'row0': budget '{unit}<=5' cannot be met: image=1 takes .* {unit}"
        ):
            answerer.answer_batch(batch, [[Budget.parse(f"{unit}<=5")]])
    with pytest.raises(ValueError, match=r"ms needs a measured bench\.json: mllm bench"):
        answerer.answer_batch(batch, [[Budget.parse("ms<=5")]])


def test_milliseconds_are_those_that_bench_has_measured(answerer: Answerer, tmp_path: Path) -> None:
    rows = [
        (f'{{"budget": "{b}", "encoder_ms": {{"median": 2}}, "prefill_ms": {{"median": {n}}}}}')
        for n, b in enumerate(BUDGETS[:2])
    ]
    (tmp_path / "bench.json").write_text(f'{{"budgets": [{", ".join(rows)}]}}')
    answerer = replace(answerer, request_costs=ModelCosts(answerer.model, answerer.processor, tmp_path))
    batch = tiny.batch(answerer.processor, ROWS[:1])
    assert str(answerer.answer_batch(batch, [[Budget.parse("ms<=2.5")]])[0][0].budget) == "image=1"
    assert str(answerer.answer_batch(batch, [[Budget.parse("ms<=3,total<=64")]])[0][0].budget) == "image=4"


def test_what_cannot_be_chosen_is_refused(answerer: Answerer) -> None:
    batch = tiny.batch(answerer.processor, ROWS[:1])
    with pytest.raises(ValueError, match=r"sample 'row0': budget 'auto' needs a router; fit one \(mllm router fit\)"):
        answerer.answer_batch(batch, [[Budget.parse("auto")]])
    routed = replace(answerer, router=router(answerer))
    sound = tiny.batch(answerer.processor, [([tiny.random_media("audio", 24), "transcribe speech to text."], "now")])
    with pytest.raises(ValueError, match="auto chooses for requests about image; this one is about audio"):
        routed.answer_batch(sound, [[Budget.parse("auto")]])
    one = router(answerer).by_media["image",]
    weak = replace(one, points=tuple(replace(point, quality=0.4) for point in one.points))
    unable = replace(answerer, router=Router({("image",): weak}, {}))
    with pytest.raises(
        ValueError, match=r"quality>=0\.5 cannot be met: on its calibration data this router reached 0\.4"
    ):
        unable.answer_batch(batch, [[Budget.parse("auto,quality>=0.5")]])
    with pytest.raises(ValueError, match="budget 'auto' says no amounts; it is resolved for one request at a time"):
        count_tokens([span.extent for span in batch.rows[0].spans], Budget.parse("auto"), answerer.processor.space)


def test_a_promised_loss_is_that_of_its_certificate_and_void_under_a_cap(answerer: Answerer) -> None:
    certificate = Certificate(
        promise=Promise(allowed_loss=0.05),
        price=0.01,
        max_growths=2,
        grid=[0.0, 0.01],
        num_units=200,
        num_questions=1200,
        mean_loss=0.02,
        mean_cost=9.0,
        fingerprint={},
    )
    one = replace(router(answerer).by_media["image",], certificates=(certificate,))
    certified = replace(answerer, router=Router({("image",): one}, {}))
    batch = tiny.batch(answerer.processor, ROWS)
    promised, priced = (
        certified.answer_batch(batch, [[Budget.parse(text)] * len(ROWS)])[0]
        for text in ("auto,loss<=0.05", "auto,price=0.01")
    )
    assert promised == priced
    with pytest.raises(
        ValueError, match=r"auto,loss<=0.05,total<=4 cannot be promised where caps or lengths leave out"
    ):
        certified.answer_batch(batch, [[Budget.parse("auto,loss<=0.05,total<=4")] * len(ROWS)])
    with pytest.raises(ValueError, match=r"loss<=0.02 is not certified for this router; certified are 0.05"):
        certified.answer_batch(batch, [[Budget.parse("auto,loss<=0.02")] * len(ROWS)])


def test_text_alone_takes_no_soft_tokens(answerer: Answerer) -> None:
    answer = replace(answerer, router=router(answerer)).answer("how many objects?", budget="auto")
    assert answer == answerer.answer("how many objects?")


def test_an_answer_about_files_is_chosen_for_like_any_other(answerer: Answerer, tmp_path: Path) -> None:
    image = tmp_path / tiny.write_media(tmp_path)["image"]
    routed = replace(answerer, router=router(answerer), max_growths=0)
    pieces: list[str] = []
    answer = routed.answer(QUESTIONS[0], image=image, budget="auto,price=0.001", on_text=pieces.append)
    assert answer == answerer.answer(QUESTIONS[0], image=image, budget=answer.budget)
    assert pieces == [answer.text]
    answers = routed.answer_questions(list(QUESTIONS), image=image, budget="auto,price=0.001")
    assert len({one.budget for one in answers}) > 1, "several questions about one image each have their budget"
