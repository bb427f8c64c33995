"""Routers are certified on media they were not fitted on, and what they promise is what they then choose by."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answer_tables import answers

from mllm.budget import Auto
from mllm.config.router import RouterCertifyConfig, RouterReportConfig
from mllm.evaluation.router_judging import certify_media_router
from mllm.router.router import FILE, MediaRouter, Router, fit_media_router, read_router
from mllm.router.table import AnswerTable

MODEL = {"trainables.safetensors": "abc"}


def settings(**changes) -> RouterCertifyConfig:
    return RouterCertifyConfig(**{"model": "m", "answers": "a", "manifest": ["validation.jsonl"], **changes})


def others(num_images: int, *, seed: int) -> AnswerTable:
    """Answers about other images than a router was fitted on."""
    table = answers(num_images, seed=seed)
    return replace(table, media_keys=tuple(f"other {key}" for key in table.media_keys))


@pytest.fixture(scope="module")
def fitted() -> MediaRouter:
    return fit_media_router(answers(60, seed=0), is_nested=True)


@pytest.fixture(scope="module")
def certified(fitted: MediaRouter) -> tuple[MediaRouter, list[str]]:
    # The kind of question that is a guess at every budget is wrong at a chosen one and right at the largest in a
    # sixth of its cases, by luck alone, so that the gap cannot be small.
    config = settings(allowed_loss=[0.01, 0.15, 0.3])
    return certify_media_router(fitted, others(200, seed=1), config, fingerprint=MODEL, is_nested=True)


def test_a_promised_loss_chooses_by_its_certificate_and_the_loss_is_kept(
    certified: tuple[MediaRouter, list[str]],
) -> None:
    router, refusals = certified
    assert [line.split(":")[0] for line in refusals] == ["answering at once", "growing up to 2 times"]
    assert all("a gap loss of at most 0.01 at confidence 0.9" in line for line in refusals)
    (strict,) = [one for one in router.certificates if (one.promise.allowed_loss, one.max_growths) == (0.15, 2)]
    (loose,) = [one for one in router.certificates if (one.promise.allowed_loss, one.max_growths) == (0.3, 2)]
    assert router.policy(Auto("loss", 0.15)).price == router.policy(Auto("loss", 0.2)).price == strict.price
    assert router.policy(Auto("loss", 0.3)).price == loose.price > strict.price
    assert strict.mean_cost < 32
    unseen = others(2000, seed=2)
    policy = router.policy(Auto("loss", 0.15))
    predictions = router.heads.predict(unseen.features, unseen.confidence)
    chosen = policy.route(predictions, unseen.tokens, is_nested=True).chosen
    gap = np.maximum(unseen.utility[:, -1] - unseen.utility[np.arange(len(unseen)), chosen], 0.0).mean()
    assert gap <= 0.15


def test_a_loss_that_is_not_certified_is_refused(certified: tuple[MediaRouter, list[str]], fitted: MediaRouter) -> None:
    with pytest.raises(ValueError, match=r"loss<=0.1 is not certified for this router; certified are 0.15, 0.3"):
        certified[0].policy(Auto("loss", 0.1))
    with pytest.raises(ValueError, match=r"loss<=0.1 .*where an answer is given at once; certified are none"):
        fitted.policy(Auto("loss", 0.1), max_growths=0)


def test_certificates_are_kept_with_the_router_and_those_of_another_model_refused(
    certified: tuple[MediaRouter, list[str]], tmp_path: Path
) -> None:
    Router({("image",): certified[0]}, MODEL).write(tmp_path)
    again = read_router(tmp_path, MODEL).of(("image",))
    assert again.certificates == certified[0].certificates
    assert again.media_digests == certified[0].media_digests
    text = (tmp_path / FILE).read_text()
    swapped = text.replace('"trainables.safetensors": "abc"', '"trainables.safetensors": "new"', 1)
    (tmp_path / FILE).write_text(swapped)  # the router's, and not the certificates'
    with pytest.raises(ValueError, match="certificate was made for another model"):
        read_router(tmp_path, {"trainables.safetensors": "new"})


def test_media_that_a_router_was_fitted_on_certify_nothing(fitted: MediaRouter) -> None:
    mixed = answers(80, seed=0)  # 60 of these it was fitted on
    with pytest.raises(ValueError, match="was fitted on 60 of the 80 images or clips of these answers"):
        certify_media_router(fitted, mixed, settings(), fingerprint=MODEL, is_nested=True)


def test_answers_at_other_budgets_certify_nothing(fitted: MediaRouter) -> None:
    table = others(20, seed=1)
    fewer = replace(
        table,
        budgets=table.budgets[:2],
        **{name: getattr(table, name)[:, :2] for name in ("utility", "tokens")},
        confidence=table.confidence[:, :2],
        flops=None,
    )
    with pytest.raises(
        ValueError, match=r"at image=1; image=4, and the router chooses among image=1; image=4; image=16"
    ):
        certify_media_router(fitted, fewer, settings(), fingerprint=MODEL, is_nested=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allowed_loss": []}, "allowed_loss is empty"),
        ({"allowed_loss": [1.5]}, "allowed_loss and confidence must be between 0 and 1, both left out; got 1.5"),
        ({"confidence": 1.0}, "both left out; got 1.0"),
    ],
)
def test_senseless_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_report_needs_a_test() -> None:
    with pytest.raises(ValueError, match="test_manifest is empty"):
        RouterReportConfig(model="m", answers="a", manifest=["v"], test_answers="b", test_manifest=[], out="o")
