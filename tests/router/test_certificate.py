"""A certificate breaks its promise no more often than it says, and says how many images are missing where it cannot."""

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mllm.budget import Budget
from mllm.router.certificate import (
    Calibration,
    CalibrationTooSmall,
    Certificate,
    Promise,
    betting_p_values,
    binomial_p_values,
    calibrate,
    certify,
    count_refuted,
    loss_of,
    p_values,
    unit_means,
    units_needed,
)
from mllm.router.policy import Policy, Predictions
from mllm.router.table import AnswerTable

NUM_DRAWS, NUM_UNITS, ALLOWED, DELTA = 1000, 100, 0.05, 0.1
MODEL = {"config.json": "one", "trainables.safetensors": "two"}
# Mean losses at the prices of a grid; they do not only grow, as those of real budgets do not.
GRADED_RISKS = np.array([0.01, 0.03, 0.02, 0.04, 0.055, 0.045, 0.07, 0.2])


def drawn_losses(kind: str, risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Losses (draws, prices, units) with the given means; prices share their luck, as one answer serves many prices."""
    rng = np.random.default_rng(0)
    shape = (NUM_DRAWS, 1, NUM_UNITS)
    if kind == "binary":
        return (rng.random(shape) < risks[:, None]).astype(float)
    if kind == "beta":  # few units lose much, most of them little
        return rng.beta(0.2, 0.8, shape) * risks[:, None] / 0.2
    hardness = rng.beta(0.5, 0.5, shape)  # six questions on each image, all of them hard or easy
    return rng.binomial(6, np.minimum(2 * risks[:, None] * hardness, 1.0)) / 6


@pytest.mark.parametrize("kind", ["binary", "beta", "questions"])
def test_promises_are_broken_no_more_often_than_allowed(kind: str) -> None:
    losses = drawn_losses(kind, GRADED_RISKS)
    promise = Promise(allowed_loss=ALLOWED, confidence=1 - DELTA)
    num_refuted = count_refuted(p_values(losses, promise), DELTA)
    is_broken = (num_refuted > 0) & (GRADED_RISKS[num_refuted - 1] > ALLOWED)
    assert is_broken.mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / NUM_DRAWS)


def test_a_price_that_merely_looked_fine_breaks_its_promise_in_about_every_second_draw() -> None:
    risks = np.linspace(0.01, 0.1, 31)
    looks_fine = drawn_losses("binary", risks).mean(axis=-1) <= ALLOWED
    dearest = looks_fine.shape[1] - 1 - np.argmax(looks_fine[:, ::-1], axis=1)
    assert 0.35 < (risks[dearest] > ALLOWED).mean() < 0.75


def test_the_exact_bound_keeps_its_promise_too() -> None:
    losses = drawn_losses("binary", GRADED_RISKS)
    num_refuted = count_refuted(binomial_p_values(losses, ALLOWED), DELTA)
    is_broken = (num_refuted > 0) & (GRADED_RISKS[num_refuted - 1] > ALLOWED)
    assert is_broken.mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / NUM_DRAWS)


@pytest.mark.parametrize("kind", ["binary", "beta"])
def test_p_values_of_a_true_hypothesis_are_small_as_rarely_as_they_say(kind: str) -> None:
    values = betting_p_values(drawn_losses(kind, np.array([ALLOWED]))[:, 0], ALLOWED, delta=DELTA)
    for level in (0.02, 0.1, 0.3):
        assert (values <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / NUM_DRAWS)


def test_the_betting_bound_equals_a_plain_loop() -> None:
    losses = np.random.default_rng(1).beta(0.3, 5.0, (3, 70))
    for row, result in zip(losses, betting_p_values(losses, ALLOWED, delta=DELTA), strict=True):
        total, squares, variance, log_capital, best = 0.0, 0.0, 0.25, 0.0, -math.inf
        for number, loss in enumerate(row.tolist(), start=1):
            bet = min(1.0, math.sqrt(2 * math.log(1 / DELTA) / (len(row) * variance)))
            log_capital += math.log(1 - bet * (loss - ALLOWED))
            best = max(best, log_capital)
            total += loss
            squares += (loss - (0.5 + total) / (1 + number)) ** 2
            variance = (0.25 + squares) / (1 + number)
        assert result == pytest.approx(min(1.0, math.exp(-best)), rel=1e-9)


@pytest.mark.parametrize(("allowed", "known_units"), [(0.01, 230), (0.02, 114), (0.05, 45)])
def test_known_numbers_of_units_suffice_without_a_loss(allowed: float, known_units: int) -> None:
    """(1 - allowed)^units <= 0.1; the bound for graded losses needs few more, not knowing them to be 0 or 1."""
    exact = Promise(allowed_loss=allowed, bound="binomial")
    assert units_needed(np.zeros(1), exact) == known_units
    assert binomial_p_values(np.zeros(known_units), allowed) == pytest.approx((1 - allowed) ** known_units)
    betting = units_needed(np.zeros(1), Promise(allowed_loss=allowed))
    assert betting is not None
    assert known_units <= betting < 1.1 * known_units


def test_the_net_loss_lets_gains_make_up_for_losses() -> None:
    chosen, largest = np.array([1.0, 0.0, 0.5, 0.0]), np.array([0.0, 1.0, 0.5, 0.25])
    np.testing.assert_array_equal(loss_of(chosen, largest, "gap"), [0.0, 1.0, 0.0, 0.25])
    np.testing.assert_array_equal(loss_of(chosen, largest, "net"), [-1.0, 1.0, 0.0, 0.25])
    # As many gains as losses: the gap is above what is allowed, the net loss is 0.
    rng = np.random.default_rng(0)
    net = rng.choice([-1.0, 0.0, 0.0, 0.0, 1.0], 2000)
    assert p_values(np.maximum(net, 0), Promise(allowed_loss=0.1)) > 0.9
    assert p_values(net, Promise(allowed_loss=0.1, loss="net")) <= 0.1


def calibration_of(risks: list[float], num_units: int, *, seed: int = 0) -> Calibration:
    """Binary losses that differ by price."""
    luck = np.random.default_rng(seed).random(num_units)
    losses = (luck < np.array(risks)[:, None]).astype(float)
    policies = [Policy(0.01 * number) for number in range(len(risks))]
    return Calibration(losses, policies, [9.0] * len(risks), 6 * num_units)


def test_a_certificate_holds_the_last_price_in_turn_that_is_proved_and_all_it_rests_on() -> None:
    calibration = calibration_of([0.0, 0.01, 0.3, 0.0], 200)
    promise = Promise(allowed_loss=0.05)
    certificate = certify(calibration, promise, fingerprint=MODEL, sets=["validation"])
    # The fourth price loses nothing, but the third was not proved, and what is tested after that proves nothing.
    assert certificate.price == 0.01
    assert certificate.mean_loss == calibration.losses[1].mean()
    assert (certificate.num_units, certificate.num_questions) == (200, 1200)
    assert certificate.grid == [0.0, 0.01, 0.02, 0.03]
    assert "at most 0.05 at confidence 0.9, by 1200 questions about 200 images or clips" in str(certificate)
    assert Certificate.from_data(json.loads(json.dumps(certificate.to_data()))) == certificate
    certificate.check(MODEL)
    with pytest.raises(ValueError, match=r"another model \(trainables.safetensors differ\); calibrate anew"):
        certificate.check({**MODEL, "trainables.safetensors": "other"})


def test_a_calibration_that_is_too_small_is_refused_with_what_is_missing() -> None:
    promise = Promise(allowed_loss=0.01, bound="binomial")
    message = r"about 30 more like these are needed, and 230 in all even if nothing were lost"
    with pytest.raises(CalibrationTooSmall, match=message) as refusal:
        certify(calibration_of([0.0], 200), promise, fingerprint=MODEL)
    assert refusal.value.missing_units == 30
    # What it says is missing is enough if the new units are like the old ones.
    few = calibration_of([0.01], 150)
    with pytest.raises(CalibrationTooSmall) as refusal:
        certify(few, Promise(allowed_loss=0.02), fingerprint=MODEL)
    assert refusal.value.missing_units is not None
    more = np.resize(few.losses[0], 150 + refusal.value.missing_units)[None]
    certify(Calibration(more, [Policy(0.0)], [9.0], 6 * more.shape[1]), Promise(allowed_loss=0.02), fingerprint=MODEL)


def test_a_loss_above_what_is_allowed_is_refused_for_good() -> None:
    with pytest.raises(CalibrationTooSmall, match=r"more of them would not help; .*take the net loss") as refusal:
        certify(calibration_of([0.5], 100), Promise(allowed_loss=0.1), fingerprint=MODEL)
    assert refusal.value.missing_units is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allowed_loss": 0.0}, "allowed_loss is 0.0; it must be between 0 and 1"),
        ({"allowed_loss": 0.1, "confidence": 1.0}, "confidence is 1.0; it must be between 0 and 1"),
        ({"allowed_loss": 0.1, "loss": "net", "bound": "binomial"}, "bound is binomial, but the net loss may also"),
    ],
)
def test_senseless_promises_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Promise(**values)


def test_graded_losses_are_refused_by_the_exact_bound() -> None:
    with pytest.raises(ValueError, match="neither 0 nor 1; use betting"):
        binomial_p_values(np.array([0.0, 0.5]), 0.1)


def test_unknown_keys_of_a_certificate_are_refused() -> None:
    data = certify(calibration_of([0.0], 200), Promise(allowed_loss=0.05), fingerprint=MODEL).to_data()
    with pytest.raises(ValueError, match=r"unknown key certificate\.color"):
        Certificate.from_data({**data, "color": "red"})


def test_calibration_measures_what_each_policy_loses_by_image() -> None:
    rng = np.random.default_rng(0)
    num_questions, media_keys = 40, tuple(f"image{number // 3}" for number in range(40))
    utility = rng.integers(0, 2, (num_questions, 3)).astype(float)
    tokens = np.tile([1.0, 4.0, 16.0], (num_questions, 1))
    table = AnswerTable(
        budgets=tuple(Budget.parse(f"image={count}") for count in (1, 4, 16)),
        sample_keys=tuple(("test", str(number)) for number in range(num_questions)),
        media_keys=media_keys,
        tasks=("vqa",) * num_questions,
        kinds=("",) * num_questions,
        utility=utility,
        tokens=tokens,
        confidence=rng.random((num_questions, 3)),
    )
    predictions = Predictions(rng.random((num_questions, 3)), rng.random((num_questions, 3, 3)))
    policies = [Policy(price, max_growths=0) for price in (0.0, 0.02, 1.0)]
    calibration = calibrate(table, predictions, policies)
    for policy, losses, cost in zip(policies, calibration.losses, calibration.costs, strict=True):
        chosen = [
            int(np.argmax([p - policy.price * t for p, t in zip(row, (1, 4, 16), strict=True)]))
            for row in predictions.before
        ]
        by_image: dict[str, list[float]] = {}
        for number, budget in enumerate(chosen):
            by_image.setdefault(media_keys[number], []).append(max(0.0, utility[number, 2] - utility[number, budget]))
        assert losses.tolist() == pytest.approx([sum(of_image) / len(of_image) for of_image in by_image.values()])
        assert cost == pytest.approx(sum((1, 4, 16)[budget] for budget in chosen) / num_questions)
    assert calibration.costs[2] == 1.0  # nothing pays at a price of one point per token
    assert unit_means(utility.T, table.units()).shape == (3, 14)
