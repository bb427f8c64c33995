"""Fits compressors to captions in closed form before the first step, so that training starts from readable soft tokens.

Knows soft tokens, the LLM's word embeddings and least squares; `readouts.py` says which maps there are. Does not know
the LLM's layers, losses or sampled budgets.

From answers alone a projector must find what a patch says and how the LLM would say it at the same time, which takes
long to begin. But a frozen encoder often holds both almost linearly. So the last linear map of each compressor is
chosen by ridge regression such that the *sum* of an item's soft tokens comes close to the sum of the embeddings of the
words of its caption; sums, because the tokens of an image add up as the words about it do. Each direction of the
features is thus pointed at the words it occurs with, without anyone saying which patch shows what. Training goes on
from there. (LLaVA, arXiv 2304.08485, spends a first stage of gradient steps on captions for the same purpose.)

The penalty is the one that does best on captions that were not fitted to, as generalised cross-validation estimates it
(Golub, Heath and Wahba 1979): where captions are not many more than inputs, one that is too small learns them by heart.

Shapes: N items, D' input size of a map, H the LLM's hidden size; all sums are float64.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor
from torch.utils.data import DataLoader

from mllm.budget import Budget
from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch, Expanded
from mllm.processing.processor import ElasticProcessor
from mllm.training.initialization.captions import check_captions, meeting, only, read_at, word_tokens
from mllm.training.initialization.readouts import Readout, opened, readouts, with_one
from mllm.training.initialization.word_start import word_media

RIDGES = tuple(10.0 ** (step / 2) for step in range(-6, 3))
"""Penalties that are tried, as multiples of the mean variance of the layer's inputs; a larger one would show all media
alike, which is no start either."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """Reports what one projector makes of the captions.

    Args:
        name: medium and budget of the projector.
        num_items: captions it was fitted to.
        explained: fraction of the variance of *other* captions that the sums of its soft tokens explain before they are
            scaled, as cross-validation estimates it; below 0 where a constant would do better.
        ridge: the penalty that was chosen, see `RIDGES`.
    """

    name: str
    num_items: int
    explained: float
    ridge: float


def fit_projectors(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    batches: DataLoader[Any],
    *,
    num_counted: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Fit]:
    """Fit the last linear map of every compressor of the media that captions show; every process calls this.

    A shared projector is fitted at its medium's largest budget, one per budget at its own each. A caption that is too
    short for a budget is left out of the fit at that budget, and the log says how many were.

    Args:
        batches: captions, one medium item and one answer per row, as training rows; the same number on every process.
        num_counted: how many of the batches of this process count; where there are fewer, the last ones repeat.
        progress: is called with how many of how many batches of this process are read.

    Returns:
        One report per projector.

    Raises:
        ValueError: a row that is no caption (it is named), fewer than two captions for a projector, or a compressor
            that does not end in a linear map.
    """
    sums: dict[tuple[str, int], _Sums] = {}
    of_words = set(word_media(model))  # they have learned to hear their words before
    model.eval()
    too_short: Counter[str] = Counter()
    for index, inputs in enumerate(batches):
        if index < num_counted:
            batch: Batch = inputs["batch"]
            check_captions(batch)
            for medium in sorted(batch.media - of_words):
                too_short += _add(sums, model, processor, only(batch, medium), medium)
            if progress is not None:
                progress(index + 1, num_counted)
    for budget, count in sum(gather_object([too_short]), Counter()).items():
        logger.warning("%d captions are too short for %s and are left out of its fit", count, budget)
    fits = []
    for medium, which in sorted(set(gather_object(list(sums)))):
        readout = _readouts(model, processor, medium)[which]
        # This process may have seen none of this medium.
        of_process = sums.get((medium, which)) or _Sums.zeros(readout, model.device)
        fits.append(_solve(of_process.over_processes(), readout))
        _log(fits[-1])
    return fits


@dataclass
class _Sums:
    """Adds up batch by batch what ridge regression needs to know of all captions.

    Args:
        items: (D'+2+H, D'+2+H), products of [summed inputs, number of inputs, 1, target] of an item.
        tokens: (D'+1, D'+1), products of [inputs, 1] of a token at the smallest budget.
        words: (2,), number of words in the captions, and the squares of their embeddings' lengths.
    """

    items: Tensor
    tokens: Tensor
    words: Tensor

    @classmethod
    def zeros(cls, readout: Readout, device: torch.device) -> "_Sums":
        """Return the sums of no captions."""
        in_size, out_size = readout.sizes
        shapes = (in_size + 2 + out_size,) * 2, (in_size + 1,) * 2, (2,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def over_processes(self) -> "_Sums":
        """Add up the sums of all processes."""
        return _Sums(*(cast(Tensor, reduce(value, "sum")) for value in (self.items, self.tokens, self.words)))


def _add(
    sums: dict[tuple[str, int], _Sums], model: Any, processor: ElasticProcessor, batch: Batch, medium: str
) -> Counter[str]:
    """Add one batch, all rows of which show one item of `medium`, to the sums of the medium's projectors.

    Returns:
        How many rows were left out, by the budget they are too short for.
    """
    too_short: Counter[str] = Counter()
    device = model.get_input_embeddings().weight.device
    compressor = model.model.compressors[medium]
    all_readouts = _readouts(model, processor, medium)
    with torch.no_grad(), opened(compressor):
        values = {name: value.to(device) for name, value in batch.values.items()}
        features = model.model.encode(medium, values[VALUE_KEYS[medium]], values.get(SIZE_KEYS[medium]))
        for which, readout in enumerate(all_readouts):
            able = meeting(batch, (readout.largest, readout.smallest), processor)
            if num_left := len(batch.rows) - len(able.rows):
                too_short[str(readout.smallest)] += num_left
            if not able.rows:
                continue
            expanded, read, counts, shown = read_at(model, processor, able, readout.largest, medium, features)
            summed, number = readout.summed(read, counts, shown.values, shown.lengths)
            _, few, few_counts, _ = read_at(model, processor, able, readout.smallest, medium, features)
            tokens = with_one(few[torch.arange(few.shape[1], device=device) < few_counts[:, None]].double())
            targets, words = _targets(model, processor, expanded, device)
            parts = [summed.double(), number.double()[:, None], torch.ones_like(targets[:, :1]), targets]
            items = torch.cat(parts, 1)
            new = _Sums(items.T @ items, tokens.T @ tokens, words)
            old = sums.get((medium, which))
            sums[medium, which] = new if old is None else _Sums(*map(torch.add, vars(old).values(), vars(new).values()))
    return too_short


def _targets(
    model: Any, processor: ElasticProcessor, expanded: Expanded, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sum the embeddings of every answer's words (N, H), and add up [their number, their squared lengths] (2,)."""
    labels, label_numbers = expanded.labels.unique(return_inverse=True)
    words = word_tokens(labels.tolist(), processor.tokenizer)
    is_word = torch.tensor([label in words for label in labels.tolist()])[label_numbers]
    embedded = model.get_input_embeddings()(expanded.labels.where(is_word, 0).to(device)).double()
    embedded = embedded * is_word.to(device)[..., None]
    return embedded.sum(1), torch.stack([is_word.sum().to(device).double(), embedded.square().sum()])


def _solve(sums: _Sums, readout: Readout) -> Fit:
    """Put the ridge solution into a compressor's last map, scaled so that soft tokens are as long as words.

    Those of the smallest budget: they are means over many features and the shortest, and an LLM that normalises what
    its layers read bears soft tokens that are too long better than some that are too short.
    """
    size, name = readout.sizes[0], str(readout.largest)
    # Rows and columns of the products: D' inputs, the number of inputs (the bias), 1, and H targets.
    inputs, one = slice(0, size + 1), size + 1
    gram, cross = sums.items[inputs, inputs], sums.items[inputs, size + 2 :]
    number, total = sums.items[one, one], sums.items[one, size + 2 :]
    means = sums.items[one, :size] / number
    spread = (sums.items[:size, :size].diagonal() / number - means.square()).mean()
    if not spread > 0:  # looked at once per run, long before the first step
        raise ValueError(f"data.captions holds {int(number)} captions for {name}; at least two that differ are needed")
    squared = sums.items[size + 2 :, size + 2 :].trace()
    solution, ridge, missed = _chosen_ridge(gram, cross, squared, number, spread)
    explained = 1.0 - missed / (squared - total.square().sum() / number)  # of the variance about the mean
    solution[size] = readout.carried(solution[:size], solution[size])
    token_square = (solution * (sums.tokens @ solution)).sum() / sums.tokens[-1, -1]
    word_square = sums.words[1] / sums.words[0]
    solution = solution * (word_square / token_square).sqrt()
    with torch.no_grad():
        readout.put(solution[:size], solution[size])
    return Fit(name, int(number), float(explained), ridge)


def _chosen_ridge(
    gram: Tensor, cross: Tensor, squared: Tensor, number: Tensor, spread: Tensor
) -> tuple[Tensor, float, Tensor]:
    """Choose the penalty whose error on other captions is estimated to be least, by generalised cross-validation.

    Args:
        gram: (D'+1, D'+1), products of the inputs and of how many an item has, which stands for the bias and is free.
        cross: (D'+1, H), products of those with the targets. squared: (), of the targets with themselves.
        number: (), items. spread: (), mean variance of the inputs.

    Returns:
        the solution (D'+1, H), its ridge, and the squared error over as many captions that it was not fitted to.
    """
    best = None
    for ridge in RIDGES:
        penalty = torch.zeros_like(gram)
        penalty.diagonal()[:-1] = ridge * number * spread
        inverse = torch.linalg.inv(gram + penalty)
        solution = inverse @ cross
        # |targets - inputs @ solution|^2, written out so that the items themselves are not needed.
        missed = squared - 2 * (solution * cross).sum() + (solution * (gram @ solution)).sum()
        freedom = (inverse * gram).sum() / number  # the trace of their product, both being symmetric
        estimated = missed / (1 - freedom).square() if freedom < 1 else torch.full_like(missed, torch.inf)
        if best is None or estimated < best[2]:
            best = solution, ridge, estimated
    assert best is not None
    return best


def _log(fit: Fit) -> None:
    logger.info(
        "%s: fitted to %d captions, explains %.0f %% of others (estimated; ridge %.2g)",
        fit.name,
        fit.num_items,
        100 * fit.explained,
        fit.ridge,
    )


def _readouts(model: Any, processor: ElasticProcessor, medium: str) -> list[Readout]:
    trained = [Budget({medium: amount}) for amount in processor.space.media[medium].trained]
    return readouts(model.model.compressors[medium], trained)
