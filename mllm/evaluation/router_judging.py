"""Certifies fitted routers and compares them with what they have to beat, on answers that they were not fitted on.

Knows evaluations, models and routers. How bounds are proved is in `mllm.router.certificate`, how policies are compared
in `routing_report.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mllm.checkpoints.model_files import fingerprint_of_model
from mllm.config.router import RouterCertifyConfig, RouterFitConfig, RouterReportConfig
from mllm.evaluation.router_fitting import Progress, described_tables
from mllm.evaluation.routing_report import RoutingReport, Setup, predict_sides, report_of
from mllm.processing.processor import ElasticProcessor
from mllm.router.certificate import CalibrationTooSmall, Certificate, Promise, calibrate, certify
from mllm.router.features import MediaSet
from mllm.router.policy import Policy
from mllm.router.router import MediaRouter, Router, read_router
from mllm.router.table import AnswerTable


@dataclass(frozen=True)
class CertifiedRouter:
    """Holds a router with its certificates, and says which promises were refused and why."""

    router: Router
    refusals: list[str]


def certify_router(
    settings: RouterCertifyConfig,
    model: Any,
    processor: ElasticProcessor,
    *,
    progress: Progress = lambda done, total: None,
) -> CertifiedRouter:
    """Certify the router beside a model for every set of media that the answers are about.

    Certificates of sets without answers stay as they were.

    Args:
        model: an `ElasticForConditionalGeneration`, the one that answered.
        processor: the one that belongs to it.

    Raises:
        FileNotFoundError: no router, or no finished evaluation.
        MediaError: a file that cannot be read any more.
        ValueError: as `read_answers`, answers at other budgets than the router's, or media it was fitted on.
    """
    fingerprint = fingerprint_of_model(settings.model_folder)
    router = read_router(settings.model_folder, fingerprint)
    by_media, refusals = dict(router.by_media), []
    for media, (table, is_nested) in described_tables(settings, model, processor, progress=progress).items():
        by_media[media], refused = certify_media_router(
            router.of(media), table, settings, fingerprint=fingerprint, is_nested=is_nested
        )
        refusals += [f"{' and '.join(media)}, {line}" for line in refused]
    return CertifiedRouter(replace(router, by_media=by_media), refusals)


def certify_media_router(
    fitted: MediaRouter,
    table: AnswerTable,
    settings: RouterCertifyConfig,
    *,
    fingerprint: Mapping[str, str],
    is_nested: bool,
) -> tuple[MediaRouter, list[str]]:
    """Certify the router of one set of media: what it loses when it grows, and when it answers at once.

    Its prices were fixed when it was fitted, on other media, so they are a grid that knows nothing of these answers.

    Args:
        table: answers at the router's budgets, with features.
        fingerprint: of the model.
        is_nested: as in `Policy.route`.

    Returns:
        The router with all that could be certified, and why the rest could not.

    Raises:
        ValueError: answers at other budgets than the router's, or about media it was fitted on.
    """
    _check_table(table, fitted)
    predictions = fitted.heads.predict(table.features, table.confidence)
    certificates: list[Certificate] = []
    refusals = []
    for max_growths in dict.fromkeys(point.max_growths for point in fitted.points):
        policies = [Policy(point.price, max_growths) for point in fitted.points if point.max_growths == max_growths]
        calibration = calibrate(table, predictions, policies, loss=settings.loss, is_nested=is_nested)
        for allowed_loss in settings.allowed_loss:
            promise = Promise(allowed_loss=allowed_loss, confidence=settings.confidence, loss=settings.loss)
            try:
                certificates.append(certify(calibration, promise, fingerprint=fingerprint, sets=settings.set_names))
            except CalibrationTooSmall as refusal:
                refusals.append(f"{growing_text(max_growths)}: {refusal}")
    return replace(fitted, certificates=tuple(certificates)), refusals


def growing_text(max_growths: int) -> str:
    """Word how often an answer may be discarded for a larger budget."""
    return f"growing up to {max_growths} times" if max_growths else "answering at once"


def _check_table(table: AnswerTable, fitted: MediaRouter) -> None:
    if table.budgets != fitted.budgets:
        answered, known = ("; ".join(map(str, budgets)) for budgets in (table.budgets, fitted.budgets))
        raise ValueError(
            f"the answers are at {answered}, and the router chooses among {known}; evaluate at the router's budgets"
        )
    if common := set(table.media_digests()) & set(fitted.media_digests):
        raise ValueError(
            f"the router was fitted on {len(common)} of the {len(table.units())} images or clips of these answers, "
            "where it is better than elsewhere; certify it on others"
        )


def compare_routers(
    settings: RouterReportConfig,
    model: Any,
    processor: ElasticProcessor,
    *,
    progress: Progress = lambda done, total: None,
) -> dict[MediaSet, RoutingReport]:
    """Fit routers on some answers and judge them on others, for every set of media that both are about.

    Args:
        model: an `ElasticForConditionalGeneration`, the one that answered.
        processor: the one that belongs to it.

    Raises:
        FileNotFoundError: no finished evaluation.
        MediaError: a file that cannot be read any more.
        ValueError: as `read_answers`, answers at other budgets, or about the same media.
    """
    test_settings: RouterFitConfig = replace(settings, answers=settings.test_answers, manifest=settings.test_manifest)
    fitted, judged = (described_tables(one, model, processor, progress=progress) for one in (settings, test_settings))
    reports = {}
    for media in (media for media in fitted if media in judged):
        (table, is_nested), (test, _) = fitted[media], judged[media]
        _check_apart(table, test)
        setup = Setup(is_nested=is_nested, num_samples=settings.num_samples, seed=settings.seed)
        reports[media] = report_of(predict_sides(table, test, seed=settings.seed), setup)
    if not reports:
        raise ValueError(f"answers and test_answers are about different media: {_sets(fitted)}, and {_sets(judged)}")
    return reports


def _check_apart(fitted: AnswerTable, test: AnswerTable) -> None:
    if fitted.budgets != test.budgets:
        raise ValueError("answers and test_answers are at different budgets; evaluate both at the same")
    known = set(fitted.media_keys)
    if common := [id_ for (_, id_), key in zip(test.sample_keys, test.media_keys, strict=True) if key in known]:
        raise ValueError(
            f"test_manifest holds sample {common[0]!r}, whose media are in manifest too; judge on other media"
        )


def _sets(tables: Collection[MediaSet]) -> str:
    return "; ".join(" and ".join(media) for media in tables)
