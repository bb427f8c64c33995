"""Holds a fitted router: heads per set of media, what each price gave on calibration data, and whose router it is.

    router.json             budgets, prices, the fingerprint of the model, the digest of the weights
    router.safetensors      the weights of the heads

Knows heads, prices and files. Does not know weights of models, samples or how questions are answered.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mllm.budget import Auto, Budget
from mllm.checkpoints.model_files import changed_files, fingerprint_of_model
from mllm.checkpoints.tensor_files import write_tensors
from mllm.config.reading import plain, read
from mllm.router.certificate import Certificate
from mllm.router.features import MediaSet
from mllm.router.heads import MIN_MEDIA, Heads, Reduction, fit_heads, predict_out_of_fold, too_few
from mllm.router.policy import MAX_GROWTHS, Policy, price_grid
from mllm.router.table import AnswerTable
from mllm.utils.files import digest_of_file, write_text_whole, written_whole
from mllm.utils.run_paths import model_folder
from mllm.utils.strict_json import read_json

FILE, WEIGHTS = "router.json", "router.safetensors"
VERSION = 3
DEFAULT_QUALITY = 0.99
"""What `auto` alone aims at: the share of the largest budget's utility. All of it would hang on a few answers that are
right at one budget and wrong at another by luck, and cost several times the tokens where they fall badly."""


@dataclass(frozen=True)
class OperatingPoint:
    """Says what a price gave on calibration data, each question predicted by heads that had not seen its media.

    Args:
        price: utility per soft token.
        max_growths: how often an answer might be discarded for a larger budget.
        mean_tokens: read per question, discarded answers included.
        quality: the share of the largest budget's utility that was reached.
    """

    price: float
    max_growths: int
    mean_tokens: float
    quality: float


@dataclass(frozen=True)
class MediaRouter:
    """Chooses the budgets of requests that hold one set of media.

    Args:
        budgets: cheapest first, each trained.
        points: what prices give, the cheapest price first.
        num_questions: that it was fitted on.
        media_digests: of what it was fitted on; nothing can be certified there.
        certificates: what is promised of its losses, by calibrations on other media.
    """

    budgets: tuple[Budget, ...]
    heads: Heads
    points: tuple[OperatingPoint, ...]
    num_questions: int
    media_digests: tuple[str, ...]
    certificates: tuple[Certificate, ...] = ()

    def policy(self, auto: Auto, *, max_growths: int = MAX_GROWTHS) -> Policy:
        """Translate a goal to a price.

        Raises:
            ValueError: a goal that no price reached on the calibration data or that was measured at other numbers of
                growths, or a loss that no certificate covers.
        """
        if auto.goal == "price":
            return Policy(auto.value, max_growths)
        if auto.goal == "loss":
            return self._certified(auto.value, max_growths)
        points = [point for point in self.points if point.max_growths == max_growths]
        if not points:
            measured = " and ".join(map(str, sorted({point.max_growths for point in self.points})))
            raise ValueError(
                f"max_growths is {max_growths}, and this router's goals were measured at {measured}; take one of "
                "these, or name a price"
            )
        if auto.goal == "mean_tokens":
            reaching = [point for point in points if point.mean_tokens <= auto.value]
            if not reaching:
                least = min(point.mean_tokens for point in points)
                raise ValueError(f"mean_tokens<={auto.value:g} cannot be met: this router needs at least {least:.4g}")
            return Policy(min(point.price for point in reaching), max_growths)
        best = max(point.quality for point in points)
        if auto.goal == "quality" and best < auto.value:
            raise ValueError(
                f"quality>={auto.value:g} cannot be met: on its calibration data this router reached {best:.4g} of the "
                "largest budget's"
            )
        wanted = auto.value if auto.goal == "quality" else min(best, DEFAULT_QUALITY)
        return Policy(max(point.price for point in points if point.quality >= wanted), max_growths)

    def _certified(self, loss: float, max_growths: int) -> Policy:
        """Return the policy of the certificate that allows most of a loss."""
        same_policy = [one for one in self.certificates if one.max_growths == max_growths]
        covering = [one for one in same_policy if one.promise.allowed_loss <= loss]
        if not covering:
            known = ", ".join(f"{one.promise.allowed_loss:g}" for one in same_policy) or "none"
            growing = "" if max_growths else " where an answer is given at once"
            raise ValueError(
                f"loss<={loss:g} is not certified for this router{growing}; certified are {known} (mllm router certify)"
            )
        return Policy(max(covering, key=lambda one: (one.promise.allowed_loss, one.price)).price, max_growths)


@dataclass(frozen=True)
class Router:
    """Chooses budgets for one model.

    Args:
        by_media: the router of each set of media.
        fingerprint: digests of the model's files, by name; a router of another model is refused.
    """

    by_media: Mapping[MediaSet, MediaRouter]
    fingerprint: Mapping[str, str]

    def of(self, media: MediaSet) -> MediaRouter:
        """Return the router of a set of media.

        Raises:
            ValueError: it was not fitted for these; those it was fitted for are named.
        """
        if media not in self.by_media:
            known = "; ".join(" and ".join(one) for one in self.by_media)
            raise ValueError(
                f"auto chooses for requests about {known}; this one is about {' and '.join(media)}: name a budget, or "
                "fit a router on such samples (mllm router fit)"
            )
        return self.by_media[media]

    def write(self, folder: str | Path) -> None:
        """Write both files, the one that names the other, and says what is in it, last."""
        path, weights = Path(folder) / FILE, Path(folder) / WEIGHTS
        tensors: dict[str, torch.Tensor] = {}
        media: dict[str, Any] = {}
        for held, router in self.by_media.items():
            name = "+".join(held)
            tensors |= {f"{name}.{key}": value for key, value in _tensors_of(router.heads).items()}
            media[name] = plain(_MediaFacts.of(router))
        with written_whole(weights) as aside:
            write_tensors(tensors, aside)
        content = _Content(VERSION, dict(self.fingerprint), digest_of_file(weights), media)
        write_text_whole(path, json.dumps(plain(content), indent=1) + "\n")


@dataclass(frozen=True)
class _MediaFacts:
    """Holds what `router.json` says of one set of media; `blocks` and `l2` are of its heads."""

    budgets: list[str]
    blocks: list[str]
    l2: float
    num_questions: int
    media_digests: list[str]
    points: list[Any]
    certificates: list[Any]

    @classmethod
    def of(cls, router: MediaRouter) -> "_MediaFacts":
        return cls(
            budgets=[str(budget) for budget in router.budgets],
            blocks=list(router.heads.reductions),
            l2=router.heads.l2,
            num_questions=router.num_questions,
            media_digests=list(router.media_digests),
            points=list(router.points),
            certificates=list(router.certificates),
        )


@dataclass(frozen=True)
class _Content:
    """Holds what `router.json` says: whose router it is, of which weights, and `_MediaFacts` by set of media."""

    version: int
    fingerprint: dict[str, str]
    weights_sha256: str
    media: dict[str, Any]


def read_router(folder: str | Path, fingerprint: Mapping[str, str]) -> Router:
    """Read the router of a model.

    Args:
        fingerprint: of the model that it is to choose for.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: files of another release or another model, or tensors that are missing, unexpected or of another
            shape.
    """
    path, weights = Path(folder) / FILE, Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {FILE}; auto needs a router: mllm router fit --model {folder}")
    content = _content_of(path)
    if changed := changed_files(content.fingerprint, fingerprint):
        raise ValueError(f"{path} was fitted for another model: {', '.join(changed)} changed since; fit it anew")
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}, which {FILE} needs; fit the router anew")
    if digest_of_file(weights) != content.weights_sha256:
        raise ValueError(f"{weights} is damaged, or not the one that {FILE} was written with; fit the router anew")
    tensors = load_file(weights)
    by_media = {
        tuple(name.split("+")): _media_router(tensors, name, facts, fingerprint)
        for name, facts in content.media.items()
    }
    if tensors:
        raise ValueError(f"{weights} holds {min(tensors)}, which {FILE} does not name")
    return Router(by_media, content.fingerprint)


def _content_of(path: Path) -> "_Content":
    """Read the file that names all others.

    Raises:
        ValueError: one that is damaged or of another release.
    """
    try:
        values = read_json(path.read_text(encoding="utf-8"))
        version = values.get("version") if isinstance(values, dict) else None
        if version == VERSION:
            return read(_Content, values, "router")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; fit it anew") from error
    raise ValueError(f"{path} has version {version!r}, and this release reads {VERSION}; fit it anew")


def _media_router(
    tensors: dict[str, torch.Tensor], media: str, values: Any, fingerprint: Mapping[str, str]
) -> MediaRouter:
    """Take the router of one set of media out of all tensors."""
    where = f"{FILE}: media.{media}"
    facts = read(_MediaFacts, values, where)
    certificates = tuple(map(Certificate.from_data, facts.certificates))
    for certificate in certificates:
        certificate.check(fingerprint)
    return MediaRouter(
        budgets=tuple(map(Budget.parse, facts.budgets)),
        heads=_heads_of(tensors, media, facts),
        points=tuple(read(OperatingPoint, point, f"{where}.points") for point in facts.points),
        num_questions=facts.num_questions,
        media_digests=tuple(facts.media_digests),
        certificates=certificates,
    )


def load_router(folder: str | Path, *, checkpoint: str | int | None = None) -> Router:
    """Load the router that was fitted for a model, to give to `Answerer(..., router=...)`.

    Args:
        folder, checkpoint: of the model, as in `mllm.load`.

    Raises:
        FileNotFoundError, ValueError: as `read_router`, or no such model.
    """
    home = model_folder(folder, checkpoint)
    return read_router(home, fingerprint_of_model(home))


def router_for(folder: Path, budgets: Sequence[Budget]) -> Router | None:
    """Load the router of a model where one of the budgets says `auto`; None otherwise.

    Raises:
        FileNotFoundError, ValueError: as `load_router`.
    """
    return load_router(folder) if any(budget.auto is not None for budget in budgets) else None


def fitted_router(folder: Path) -> Router | None:
    """Load the router of a model where one was fitted; None otherwise, and `auto` is refused where it is asked for.

    Raises:
        ValueError: as `load_router`.
    """
    return load_router(folder) if (folder / FILE).is_file() else None


def fit_media_router(table: AnswerTable, *, is_nested: bool, blocks: Sequence[str] | None = None) -> MediaRouter:
    """Fit the router of one set of media on held-out answers.

    Args:
        is_nested: as in `Policy.route`.
        blocks: features to look at; all of the table's when None.

    Raises:
        ValueError: too few media, or fewer than two budgets.
    """
    if len(table.budgets) < 2:
        raise ValueError(
            f"the answers are at {len(table.budgets)} budget, and a router chooses among at least 2: evaluate at the "
            "trained budgets"
        )
    if (num_media := len(table.units())) < MIN_MEDIA:
        raise too_few(num_media)
    predictions = predict_out_of_fold(table, blocks)
    rows = np.arange(len(table))
    largest = table.utility[:, -1].mean()
    points = []
    for max_growths in (0, MAX_GROWTHS):
        for price in price_grid(float(table.tokens[:, -1].mean())):
            routes = Policy(float(price), max_growths).route(predictions, table.tokens, is_nested=is_nested)
            quality = table.utility[rows, routes.chosen].mean() / max(largest, 1e-9)
            points.append(OperatingPoint(float(price), max_growths, float(routes.spent.mean()), float(quality)))
    return MediaRouter(table.budgets, fit_heads(table, blocks), tuple(points), len(table), tuple(table.media_digests()))


def _tensors_of(heads: Heads) -> dict[str, torch.Tensor]:
    arrays = {"before": heads.before, "after": heads.after}
    for name, reduction in heads.reductions.items():
        arrays |= {f"{name}.{one.name}": getattr(reduction, one.name) for one in fields(reduction)}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _heads_of(tensors: dict[str, torch.Tensor], media: str, facts: _MediaFacts) -> Heads:
    """Take the heads of one set of media out of all tensors.

    Raises:
        ValueError: one that is missing, or whose shape does not go with the budgets and the features.
    """

    def take(name: str) -> np.ndarray:
        key = f"{media}.{name}"
        if key not in tensors:
            raise ValueError(f"{WEIGHTS} lacks {key}, which {FILE} names")
        return tensors.pop(key).numpy()

    reductions = {name: Reduction(take(f"{name}.mean"), take(f"{name}.components")) for name in facts.blocks}
    before, after = take("before"), take("after")
    width, count = sum(one.components.shape[1] for one in reductions.values()), len(facts.budgets)
    for name, array, shape in (("before", before, (1 + width, count)), ("after", after, (count, 2 + width, count))):
        if array.shape != shape:
            raise ValueError(f"{WEIGHTS}: {media}.{name} has shape {array.shape}, and {FILE} asks for {shape}")
    return Heads(reductions, before, after, facts.l2)
