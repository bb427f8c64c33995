"""Checks the contract of an encoder: its facts, batches, padding, the smallest input, and staying frozen.

Knows `Encoder` and `EncoderFacts`. Does not know what an encoder computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.encoders.base import Encoder, EncoderFacts, freeze


@dataclass(frozen=True)
class EncoderCase:
    """An encoder with its facts and some inputs.

    Args:
        encoder: with random weights, in float32 on the CPU.
        facts: what was told of it from its config alone.
        inputs: of single items, without padding: images (3, h, w), waveforms (L,), frames (T, ...). Items of
            different length differ in their first axis.
        sizes: of each item, for streams the raw length and for images that keep their shape (rows, columns); None for
            images of one size.
        tolerance: largest difference, relative to the largest value, between results that should be equal.
    """

    encoder: Encoder
    facts: EncoderFacts
    inputs: Sequence[Tensor]
    sizes: Sequence[int] | Sequence[tuple[int, int]] | None = None
    tolerance: float = 1e-4

    def encode(self, items: Sequence[int], *, padding: float = 0.0) -> tuple[Tensor, list[int]]:
        """Encodes items as one batch, padded with a value: features (N, T, D) and the true features of each."""
        inputs = [self.inputs[item] for item in items]
        if self.sizes is None:
            features = self.encoder(torch.stack(inputs))
            return features, [features.shape[1]] * len(items)
        values = torch.full((len(inputs), max(map(len, inputs)), *inputs[0].shape[1:]), padding)
        for row, value in zip(values, inputs, strict=True):
            row[: len(value)] = value
        features, lengths = self.encoder(values, torch.tensor([self.sizes[item] for item in items]))
        return features, lengths.tolist()


def check_encoder(case: EncoderCase) -> None:
    """Checks everything an encoder promises.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    case.encoder.eval()
    with torch.no_grad():
        check_facts(case)
        check_batches(case)
        check_smallest_input(case)
    check_freezing(case)


def check_facts(case: EncoderCase) -> None:
    """Checks that size and number of the features are those that the config told."""
    for item in range(len(case.inputs)):
        features, (length,) = case.encode([item])
        assert features.shape[2] == case.facts.hidden_size == case.encoder.hidden_size, (
            f"features are {features.shape[2]} wide, and the facts say {case.facts.hidden_size}"
        )
        if case.sizes is None:
            assert case.facts.grid is not None
            wanted = case.facts.grid[0] * case.facts.grid[1]
        elif isinstance(size := case.sizes[item], tuple):
            wanted = size[0] * size[1]
        else:
            wanted = case.facts.num_frames(size)
        assert length == wanted, f"item {item} has {length} features, and the facts say {wanted}"
        assert features.shape[1] >= length


def check_batches(case: EncoderCase) -> None:
    """Checks that an item gives in a batch what it gives alone, whatever value pads the batch."""
    items = range(len(case.inputs))
    for padding in (0.0, 1.0):
        together, lengths = case.encode(items, padding=padding)
        for item in items:
            alone, _ = case.encode([item])
            got, wanted = together[item, : lengths[item]], alone[0, : lengths[item]]
            error, scale = (got - wanted).abs().max().item(), max(wanted.abs().max().item(), 1e-12)
            assert error <= case.tolerance * scale, (
                f"item {item} differs from itself alone by {error:.3g} in a batch padded with {padding:g}"
            )


def check_smallest_input(case: EncoderCase) -> None:
    """Checks that the smallest input is encoded, for processes whose batch holds none of this medium."""
    values, sizes = case.encoder.smallest_input()
    output = case.encoder(values) if sizes is None else case.encoder(values, sizes)[0]
    assert output.shape[0] == 1
    assert output.shape[1] >= 1, "the smallest input gives no feature"


def check_freezing(case: EncoderCase) -> None:
    """Checks that a frozen encoder has nothing to train and stays in `eval()`. It is frozen afterwards."""
    freeze(case.encoder)
    case.encoder.train()
    assert not any(module.training for module in case.encoder.modules()), "a frozen encoder leaves eval()"
    assert not any(parameter.requires_grad for parameter in case.encoder.parameters())
