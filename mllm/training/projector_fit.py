"""Fits projectors to captions in closed form before the first step, so that training starts from readable soft tokens.

Knows soft tokens, the LLM's word embeddings and least squares. Does not know the LLM's layers, losses or draws.

From answers alone a projector must find what a patch says and how the LLM would say it at the same time, which takes
long to begin. But a frozen encoder often holds both almost linearly. So the last linear layer of each projector is
chosen by ridge regression such that the *sum* of an item's soft tokens comes close to the sum of the embeddings of the
words of its caption; sums, because the tokens of a picture add up as the words about it do. Each direction of the
features is thus pointed at the words it occurs with, without anyone saying which patch shows what. Training goes on
from there. (LLaVA, arXiv 2304.08485, spends a first stage of gradient steps on captions for the same purpose.)

Shapes: N items, D' input size of a projector's last layer, H the LLM's hidden size; all sums are float64.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from mllm.budget import Budget
from mllm.compressors import MixtureProjector, ProjectorBank
from mllm.expansion import Batch, Expanded
from mllm.modeling import ElasticForConditionalGeneration
from mllm.modeling_body import SIZE_KEYS, VALUE_KEYS, Features
from mllm.processing import ElasticProcessor

RIDGE = 1e-3
"""Of the mean variance of the layer's inputs."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What one projector makes of the captions.

    Args:
        name: medium and budget of the projector.
        num_items: captions it was fitted to.
        explained: share of the captions' variance that the sums of its soft tokens explain, before they are scaled.
    """

    name: str
    num_items: int
    explained: float


def fit_projectors(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, batches: DataLoader[Any], *, own: int
) -> list[Fit]:
    """Fit the last layer of every projector of the media that captions show; every process calls this.

    A shared projector is fitted at its medium's largest budget, one per budget at its own each.

    Args:
        batches: captions, one medium item and one answer per row, as training rows; the same number on every process.
        own: how many of the batches of this process count; where there are fewer, the last ones repeat.

    Returns:
        One report per projector.

    Raises:
        ValueError: a row that is no caption (it is named), fewer than two captions for a projector, or a projector that
            does not end in a linear layer.
    """
    sums: dict[tuple[str, int], _Sums] = {}
    model.eval()
    for index, inputs in enumerate(batches):
        if index < own:
            batch: Batch = inputs["batch"]
            _check_captions(batch)
            for medium in sorted(batch.media):
                _add(sums, model, processor, _only(batch, medium), medium)
    fits = []
    for medium, which in sorted(set(gather_object(list(sums)))):
        bank = _bank(model, medium)
        budget, _ = _budgets(processor, medium, bank)[which]
        last = cast(nn.Linear, cast(nn.Sequential, bank[which])[-1])
        own_sums = sums.get((medium, which)) or _Sums.zeros(last)  # this process may have seen none of this medium
        fits.append(_solve(own_sums.over_processes(), last, str(budget)))
        logger.info("%s: captions explain %.0f %%", fits[-1].name, 100 * fits[-1].explained)
    return fits


@dataclass
class _Sums:
    """What ridge regression needs to know of all captions, added up batch by batch.

    Args:
        items: (D'+2+H, D'+2+H), products of [summed inputs, number of tokens, 1, target] of an item.
        tokens: (D'+1, D'+1), products of [inputs, 1] of a token at the smallest budget.
        words: (2,), number of words in the captions, and the squares of their embeddings' lengths.
    """

    items: Tensor
    tokens: Tensor
    words: Tensor

    @classmethod
    def zeros(cls, last: nn.Linear) -> "_Sums":
        """The sums of no captions, for a projector's last layer."""
        sizes = (last.in_features + 2 + last.out_features,) * 2, (last.in_features + 1,) * 2, (2,)
        return cls(*(torch.zeros(size, dtype=torch.float64, device=last.weight.device) for size in sizes))

    def over_processes(self) -> "_Sums":
        """The same over the captions of all processes."""
        return _Sums(*(cast(Tensor, reduce(value, "sum")) for value in (self.items, self.tokens, self.words)))


def _add(
    sums: dict[tuple[str, int], _Sums], model: Any, processor: ElasticProcessor, batch: Batch, medium: str
) -> None:
    """Add one batch, all rows of which show one item of `medium`, to the sums of the medium's projectors."""
    device = model.get_input_embeddings().weight.device
    bank = _bank(model, medium)
    with torch.no_grad(), _without_last_layers(bank):
        values = {name: value.to(device) for name, value in batch.values.items()}
        features = model.model.encode(medium, values[VALUE_KEYS[medium]], values.get(SIZE_KEYS[medium]))
        for which, (largest, smallest) in enumerate(_budgets(processor, medium, bank)):
            expanded = processor.expand(batch, [[largest] * len(batch.rows)], left_padding=False)
            summed, counts, _ = _inputs(model, expanded, medium, features)
            few = processor.expand(batch, [[smallest] * len(batch.rows)], left_padding=False)
            *_, tokens = _inputs(model, few, medium, features)
            targets, words = _targets(model, processor, expanded, device)
            items = torch.cat([summed, counts[:, None], torch.ones_like(targets[:, :1]), targets], 1)
            new = _Sums(items.T @ items, tokens.T @ tokens, words)
            old = sums.get((medium, which))
            sums[medium, which] = new if old is None else _Sums(*map(torch.add, vars(old).values(), vars(new).values()))


def _inputs(model: Any, expanded: Expanded, medium: str, features: Features) -> tuple[Tensor, Tensor, Tensor]:
    """What the last layer is fed with: summed over each item's tokens (N, D'), their counts, and each token's and 1."""
    given = {name: value.to(features.values.device) for name, value in expanded.inputs.items()}
    counts = given[f"num_{medium}_tokens"]
    read = model.model.compress(
        medium,
        features,
        num_tokens=counts,
        rates=given.get(f"{medium}_rates"),
        index=given.get(f"{medium}_index"),
        max_tokens=given["input_ids"].shape[1],
    ).double()
    is_token = torch.arange(read.shape[1], device=read.device) < counts[:, None]
    return read.sum(1), counts.double(), functional.pad(read[is_token], (0, 1), value=1.0)


def _targets(
    model: Any, processor: ElasticProcessor, expanded: Expanded, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The summed embeddings (N, H) of every answer's words, and [their number, their squared lengths] (2,)."""
    labels, places = expanded.labels.unique(return_inverse=True)
    # Punctuation and special tokens stand in every caption alike and say nothing about any picture.
    texts = [processor.tokenizer.decode([max(label, 0)], skip_special_tokens=True) for label in labels.tolist()]
    says = [label >= 0 and any(map(str.isalnum, text)) for label, text in zip(labels.tolist(), texts, strict=True)]
    is_word = torch.tensor(says)[places]
    embedded = model.get_input_embeddings()(expanded.labels.where(is_word, 0).to(device)).double()
    embedded = embedded * is_word.to(device)[..., None]
    return embedded.sum(1), torch.stack([is_word.sum().to(device).double(), embedded.square().sum()])


def _solve(sums: _Sums, last: nn.Linear, name: str) -> Fit:
    """Put the ridge solution into a projector's last layer, scaled so that soft tokens are as long as words.

    Those of the smallest budget: they are means over many features and the shortest, and an LLM that normalises what
    its layers read bears soft tokens that are too long better than some that are too short.
    """
    size = last.in_features
    inputs, one = slice(0, size + 1), size + 1
    gram, cross = sums.items[inputs, inputs], sums.items[inputs, size + 2 :]
    number, total = sums.items[one, one], sums.items[one, size + 2 :]
    means = sums.items[one, :size] / number
    spread = (sums.items[:size, :size].diagonal() / number - means.square()).mean()
    if not spread > 0:  # looked at once per run, long before the first step
        raise ValueError(f"data.captions holds {int(number)} captions for {name}; at least two that differ are needed")
    penalty = torch.zeros_like(gram)
    penalty.diagonal()[:size] = RIDGE * number * spread
    solution = torch.linalg.solve(gram + penalty, cross)
    squared = sums.items[size + 2 :, size + 2 :].trace()
    missed = squared - 2 * (solution * cross).sum() + (solution * (gram @ solution)).sum()
    explained = 1.0 - missed / (squared - total.square().sum() / number)
    spoken = (solution * (sums.tokens @ solution)).sum() / sums.tokens[-1, -1]
    solution = solution * (sums.words[1] / sums.words[0] / spoken).sqrt()
    with torch.no_grad():
        last.weight.copy_(solution[:size].T)
        last.bias.copy_(solution[size])
    return Fit(name, int(number), float(explained))


def _bank(model: Any, medium: str) -> ProjectorBank:
    bank = getattr(model.model.compressors[medium], "projectors", None)
    if bank is None:
        raise ValueError(f"data.captions holds {medium}, whose compressor has no projector; allowed: pool, stack")
    return bank


@contextmanager
def _without_last_layers(bank: ProjectorBank) -> Iterator[None]:
    """Every projector gives what its last layer is fed with; what follows the projectors is linear."""
    if any(isinstance(projector, MixtureProjector) for projector in bank):
        raise ValueError("data.captions fits one projector, not a mixture; leave out projector_experts or the captions")
    lasts = [cast(nn.Sequential, projector)[-1] for projector in bank]
    if others := {type(last).__name__ for last in lasts if not isinstance(last, nn.Linear)}:
        raise ValueError(
            f"data.captions needs projectors that end in a linear layer, got {', '.join(sorted(others))}; "
            "set projector_norm to false"
        )
    try:
        for projector in bank:
            cast(nn.Sequential, projector)[-1] = nn.Identity()
        yield
    finally:
        for projector, last in zip(bank, lasts, strict=True):
            cast(nn.Sequential, projector)[-1] = last


def _budgets(processor: ElasticProcessor, medium: str, bank: ProjectorBank) -> list[tuple[Budget, Budget]]:
    """The largest and the smallest budget each projector of a bank is for."""
    trained = [Budget({medium: amount}) for amount in processor.space.media[medium].trained]
    return [(budget, budget) for budget in trained] if bank.budgets else [(trained[0], trained[-1])]


def _check_captions(batch: Batch) -> None:
    for row in batch.rows:
        if len(row.runs) != 1:
            raise ValueError(
                f"sample {row.sample_id!r} of data.captions shows {len(row.runs)} media items; a caption has one"
            )


def _only(batch: Batch, medium: str) -> Batch:
    """The rows that show an item of a medium; the encoded items stay as they are."""
    return Batch([row for row in batch.rows if row.runs[0].extent.medium == medium], batch.values)
