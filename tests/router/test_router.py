"""What a router promises: goals are met on calibration data, files are strict, and choices follow the gain alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mllm.budget import Auto, Budget
from mllm.router.heads import Reduction, fit_heads, folds_of
from mllm.router.policy import Policy, Predictions, price_grid
from mllm.router.router import FILE, WEIGHTS, MediaRouter, Router, fit_media_router, read_router
from mllm.router.table import AnswerTable
from mllm.utils.files import digest_of_file

BUDGETS = tuple(Budget.parse(text) for text in ("image=1", "image=4", "image=64"))
TOKENS = (1.0, 4.0, 64.0)
FINGERPRINT = {"trainables.safetensors": "abc"}


def table(num_media: int = 150, seed: int = 0) -> AnswerTable:
    """Three questions per picture: an easy one, one that needs 64 tokens, and one that is right half the time anywhere.

    The confidence at a budget says little of the third kind and much of the second.
    """
    rng = np.random.default_rng(seed)
    kinds = np.tile(["easy", "hard", "luck"], num_media)
    right = {"easy": (0.97, 0.98, 0.98), "hard": (0.1, 0.3, 0.97), "luck": (0.5, 0.5, 0.5)}
    utility = (rng.random((len(kinds), 3)) < np.asarray([right[kind] for kind in kinds])).astype(float)
    confidence = np.clip(0.55 + 0.35 * utility + rng.normal(0, 0.05, utility.shape), 0.01, 0.99)
    confidence[kinds == "luck"] = 0.6
    question = rng.normal(0, 0.3, (len(kinds), 40))
    question[np.arange(len(kinds)), [("easy", "hard", "luck").index(kind) for kind in kinds]] += 2.0
    return AnswerTable(
        budgets=BUDGETS,
        sample_keys=tuple(("set", str(number)) for number in range(len(kinds))),
        media_keys=tuple(str(number // 3) for number in range(len(kinds))),
        tasks=("vqa",) * len(kinds),
        kinds=tuple(kinds),
        utility=utility,
        tokens=np.tile(TOKENS, (len(kinds), 1)),
        confidence=confidence,
        features={"question": question, "facts": np.ones((len(kinds), 3))},
    )


@pytest.fixture(scope="module")
def answers() -> AnswerTable:
    return table()


@pytest.fixture(scope="module")
def fitted(answers: AnswerTable) -> MediaRouter:
    return fit_media_router(answers, is_nested=False)


def test_it_spends_on_questions_that_gain_and_not_on_those_that_stay_uncertain(fitted: MediaRouter) -> None:
    unseen = table(seed=1)
    predictions = fitted.heads.predict(unseen.features, unseen.confidence)
    routes = Policy(0.004).route(predictions, unseen.tokens, is_nested=False)
    kinds = np.asarray(unseen.kinds)
    spent = {kind: routes.spent[kinds == kind].mean() for kind in ("easy", "hard", "luck")}
    assert spent["hard"] > 40
    assert max(spent["easy"], spent["luck"]) < 8
    rows = np.arange(len(unseen))
    lost = unseen.utility[:, -1].mean() - unseen.utility[rows, routes.chosen].mean()
    assert lost < 0.03
    # A threshold on the confidence would send every question of the third kind to the largest budget.
    assert (unseen.confidence[kinds == "luck"] < unseen.confidence[kinds == "easy"].mean()).all()


def test_predictions_are_calibrated_by_kind(answers: AnswerTable) -> None:
    unseen = table(seed=2)
    before = fit_heads(answers).predict_before(unseen.features)
    kinds = np.asarray(unseen.kinds)
    for kind in ("easy", "hard", "luck"):
        gap = before[kinds == kind].mean(axis=0) - unseen.utility[kinds == kind].mean(axis=0)
        assert np.abs(gap).max() < 0.12, kind


def test_shuffled_questions_are_worth_no_more_than_none(answers: AnswerTable) -> None:
    rng = np.random.default_rng(0)
    shuffled = replace(answers, features={"question": answers.features["question"][rng.permutation(len(answers))]})
    spread = fit_heads(shuffled).predict_before(table(seed=3).features).std(axis=0)
    assert spread.max() < 0.25 * fit_heads(answers).predict_before(table(seed=3).features).std(axis=0).max()


def test_no_medium_is_in_two_folds(answers: AnswerTable) -> None:
    folds = folds_of(answers)
    assert all(len(set(folds[rows])) == 1 for rows in answers.units())
    assert len(set(folds)) == 5
    with pytest.raises(ValueError, match="19 pictures or clips are too few to fit a router, which takes at least 20"):
        fit_media_router(answers.take(range(57)), is_nested=False)


@pytest.mark.parametrize("is_nested", [True, False])
def test_everything_that_is_read_is_paid(is_nested: bool) -> None:
    before = np.asarray([[0.5, 0.4, 0.4]])
    after = np.zeros((1, 3, 3))
    after[0, 0] = [0.1, 0.5, 0.45]
    after[0, 1] = [0.0, 0.2, 0.9]
    costs = np.asarray([TOKENS])
    routes = Policy(0.001).route(Predictions(before, after), costs, is_nested=is_nested)
    assert (routes.chosen[0], routes.num_growths[0]) == (2, 2)
    assert routes.spent[0] == (64 if is_nested else 1 + 4 + 64)
    once = Policy(0.001, max_growths=1).route(Predictions(before, after), costs, is_nested=is_nested)
    assert (once.chosen[0], once.spent[0]) == (1, 4 if is_nested else 5)
    assert Policy(0.001, max_growths=0).route(Predictions(before, after), costs, is_nested=is_nested).spent[0] == 1


def test_a_budget_that_cannot_be_had_is_never_chosen() -> None:
    before = np.asarray([[0.1, 0.2, 0.9], [0.1, 0.9, 0.9]])
    costs = np.asarray([[1.0, 4.0, np.inf], [1.0, np.inf, np.inf]])
    for price in (0.0, 0.01):
        assert Policy(price).first(before, costs).tolist() == [1, 0]


def test_goals_are_met_on_the_calibration_data(fitted: MediaRouter) -> None:
    for auto, check in [
        (Auto("quality", 0.95), lambda point: point.quality >= 0.95),
        (Auto("mean_tokens", 30.0), lambda point: point.mean_tokens <= 30.0),
        (Auto(), lambda point: point.quality >= min(0.99, max(one.quality for one in fitted.points))),
    ]:
        policy = fitted.policy(auto)
        points = {point.price: point for point in fitted.points if point.max_growths == policy.max_growths}
        assert check(points[policy.price])
    cheap, dear = (fitted.policy(Auto("mean_tokens", tokens)).price for tokens in (5.0, 40.0))
    assert cheap > dear, "fewer tokens are a higher price"
    assert fitted.policy(Auto("price", 0.0125)).price == 0.0125
    with pytest.raises(ValueError, match=r"mean_tokens<=0.5 cannot be met: this router needs at least 1"):
        fitted.policy(Auto("mean_tokens", 0.5))
    assert fitted.policy(Auto("price", 0.0125), max_growths=1).max_growths == 1
    for auto in (Auto(), Auto("quality", 0.5), Auto("mean_tokens", 30.0)):
        with pytest.raises(ValueError, match=r"max_growths is 1, and this router's goals were measured at 0 and 2"):
            fitted.policy(auto, max_growths=1)


def test_the_grid_of_prices_ends_where_nothing_but_the_cheapest_pays(fitted: MediaRouter, answers: AnswerTable) -> None:
    prices = price_grid(64.0)
    assert prices[0] == 0
    assert (np.diff(prices) > 0).all()
    predictions = fitted.heads.predict(answers.features, answers.confidence)
    assert set(Policy(float(prices[-1])).route(predictions, answers.tokens, is_nested=False).chosen) == {0}


def test_a_written_router_is_the_same_router(fitted: MediaRouter, answers: AnswerTable, tmp_path: Path) -> None:
    Router({("image",): fitted}, FINGERPRINT).write(tmp_path)
    again = read_router(tmp_path, FINGERPRINT).of(("image",))
    assert (again.budgets, again.points) == (fitted.budgets, fitted.points)
    expected = fitted.heads.predict(answers.features, answers.confidence)
    predictions = again.heads.predict(answers.features, answers.confidence)
    np.testing.assert_array_equal(predictions.before, expected.before)
    np.testing.assert_array_equal(predictions.after, expected.after)


def test_files_of_another_model_or_in_pieces_are_refused(fitted: MediaRouter, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="auto needs a router: mllm router fit"):
        read_router(tmp_path, FINGERPRINT)
    Router({("image",): fitted}, FINGERPRINT).write(tmp_path)
    with pytest.raises(ValueError, match=r"fitted for another model: trainables.safetensors changed"):
        read_router(tmp_path, {"trainables.safetensors": "abd"})
    with pytest.raises(ValueError, match=r"auto chooses for requests about image; this one is about image and audio"):
        read_router(tmp_path, FINGERPRINT).of(("image", "audio"))
    tensors = load_file(tmp_path / WEIGHTS)
    content = json.loads((tmp_path / FILE).read_text())
    for changed, message in [
        ({name: value for name, value in tensors.items() if name != "image.after"}, "lacks image.after"),
        (tensors | {"image.more": tensors["image.before"].clone()}, "holds image.more"),
        (tensors | {"image.before": tensors["image.before"][:-1].clone()}, r"image.before has shape"),
    ]:
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=r"router.safetensors is damaged, or not the one that router.json"):
            read_router(tmp_path, FINGERPRINT)
        digest = digest_of_file(tmp_path / WEIGHTS)
        (tmp_path / FILE).write_text(json.dumps(content | {"weights_sha256": digest}))
        with pytest.raises(ValueError, match=message):
            read_router(tmp_path, FINGERPRINT)
    (tmp_path / FILE).write_text(json.dumps(content | {"version": 0}))
    with pytest.raises(ValueError, match="has version 0"):
        read_router(tmp_path, FINGERPRINT)


def test_damaged_files_are_refused_by_name(fitted: MediaRouter, tmp_path: Path) -> None:
    Router({("image",): fitted}, FINGERPRINT).write(tmp_path)
    weights, text = (tmp_path / WEIGHTS).read_bytes(), (tmp_path / FILE).read_text()
    content = json.loads(text)
    for damaged in (weights[:-8], weights[:-1] + bytes([weights[-1] ^ 1]), b""):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"router.safetensors is damaged, or not the one"):
            read_router(tmp_path, FINGERPRINT)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no router.safetensors, which router.json needs"):
        read_router(tmp_path, FINGERPRINT)
    (tmp_path / WEIGHTS).write_bytes(weights)
    image = content["media"]["image"]
    for damaged, message in [
        (text[:-20], r"router.json is damaged: not JSON"),
        ("[]", r"has version None, and this release reads"),
        (json.dumps({**content, "more": 1}), r"router.json is damaged: unknown key router.more"),
        (json.dumps({**content, "fingerprint": "abc"}), r"router.json is damaged: router.fingerprint: expected dict"),
        (json.dumps({**content, "media": {"image": {**image, "l2": "x"}}}), r"media.image.l2: expected float, got x"),
        (json.dumps({**content, "media": {"image": {**image, "points": [{}]}}}), r"points.price is missing"),
        (json.dumps({**content, "media": {"sound": image}}), r"lacks sound.question.mean"),
    ]:
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(ValueError, match=message):
            read_router(tmp_path, FINGERPRINT)


def test_what_never_differed_is_no_feature() -> None:
    block = np.full((30, 2), np.log2(65.0))
    assert Reduction.fit(block).components.shape == (2, 0), "rounding is no direction"
    block[:, 1] += np.arange(30)
    reduced = Reduction.fit(block)
    assert reduced.components.shape == (2, 1)
    assert np.isfinite(reduced(block * 2)).all()
    np.testing.assert_allclose((reduced(block) ** 2).mean(), 1.0)
