"""Holds a fitted router: heads per set of media, what each price gave on calibration data, and whose router it is.

    router.json             budgets, prices, the fingerprint of the model
    router.safetensors      the weights of the heads

Knows heads, prices and files. Does not know weights of models, samples or how questions are answered.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mllm.budget import Auto, Budget
from mllm.checkpoints.model_files import fingerprint_of_model
from mllm.checkpoints.tensor_files import write_tensors
from mllm.router.certificate import Certificate
from mllm.router.features import MediaSet
from mllm.router.heads import MIN_MEDIA, Heads, Reduction, fit_heads, predict_out_of_fold, too_few
from mllm.router.policy import MAX_GROWTHS, Policy, price_grid
from mllm.router.table import AnswerTable
from mllm.utils.files import write_text_whole, written_whole
from mllm.utils.run_paths import model_folder

FILE, WEIGHTS = "router.json", "router.safetensors"
VERSION = 1
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
            ValueError: a goal that no price reached on the calibration data, or a loss that no certificate covers.
        """
        if auto.goal == "price":
            return Policy(auto.value, max_growths)
        if auto.goal == "loss":
            return self._certified(auto.value, max_growths)
        points = [point for point in self.points if point.max_growths == max_growths]
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
        """Write both files, the one that names the other last."""
        tensors: dict[str, torch.Tensor] = {}
        facts: dict[str, Any] = {}
        for media, router in self.by_media.items():
            name = "+".join(media)
            tensors |= {f"{name}.{key}": value for key, value in _tensors_of(router.heads).items()}
            facts[name] = {
                "budgets": [str(budget) for budget in router.budgets],
                "blocks": list(router.heads.reductions),
                "l2": router.heads.l2,
                "num_questions": router.num_questions,
                "media": list(router.media_digests),
                "points": [asdict(point) for point in router.points],
                "certificates": [one.to_data() for one in router.certificates],
            }
        content = {"version": VERSION, "fingerprint": dict(self.fingerprint), "media": facts}
        with written_whole(Path(folder) / WEIGHTS) as aside:
            write_tensors(tensors, aside)
        write_text_whole(Path(folder) / FILE, json.dumps(content, indent=1) + "\n")


def read_router(folder: str | Path, fingerprint: Mapping[str, str]) -> Router:
    """Read the router of a model.

    Args:
        fingerprint: of the model that it is to choose for.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: files of another release or another model, or tensors that are missing, unexpected or of another
            shape.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {FILE}; auto needs a router: mllm router fit --model {folder}")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}, and this release reads {VERSION}; fit it anew"
        )
    if changed := sorted(
        name
        for name in content["fingerprint"].keys() | fingerprint.keys()
        if content["fingerprint"].get(name) != fingerprint.get(name)
    ):
        raise ValueError(f"{path} was fitted for another model: {', '.join(changed)} changed since; fit it anew")
    tensors = load_file(Path(folder) / WEIGHTS)
    by_media = {}
    for name, facts in content["media"].items():
        by_media[tuple(name.split("+"))] = MediaRouter(
            budgets=tuple(Budget.parse(text) for text in facts["budgets"]),
            heads=_heads_of(tensors, name, facts),
            points=tuple(OperatingPoint(**point) for point in facts["points"]),
            num_questions=facts["num_questions"],
            media_digests=tuple(facts["media"]),
            certificates=tuple(_certificate(data, fingerprint) for data in facts["certificates"]),
        )
    if tensors:
        raise ValueError(f"{Path(folder) / WEIGHTS} holds {min(tensors)}, which {FILE} does not name")
    return Router(by_media, dict(content["fingerprint"]))


def _certificate(data: Any, fingerprint: Mapping[str, str]) -> Certificate:
    certificate = Certificate.from_data(data)
    certificate.check(fingerprint)
    return certificate


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


def _heads_of(tensors: dict[str, torch.Tensor], media: str, facts: Mapping[str, Any]) -> Heads:
    """Take the heads of one set of media out of all tensors.

    Raises:
        ValueError: one that is missing, or whose shape does not go with the budgets and the features.
    """

    def take(name: str) -> np.ndarray:
        key = f"{media}.{name}"
        if key not in tensors:
            raise ValueError(f"{WEIGHTS} lacks {key}, which {FILE} names")
        return tensors.pop(key).numpy()

    reductions = {name: Reduction(take(f"{name}.mean"), take(f"{name}.components")) for name in facts["blocks"]}
    before, after = take("before"), take("after")
    width, count = sum(one.components.shape[1] for one in reductions.values()), len(facts["budgets"])
    for name, array, shape in (("before", before, (1 + width, count)), ("after", after, (count, 2 + width, count))):
        if array.shape != shape:
            raise ValueError(f"{WEIGHTS}: {media}.{name} has shape {array.shape}, and {FILE} asks for {shape}")
    return Heads(reductions, before, after, float(facts["l2"]))
