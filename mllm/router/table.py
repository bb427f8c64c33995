"""Holds what is known of questions that were answered at each of several budgets: the data that a router is made of.

Knows arrays. Does not know models, files, or how an answer is judged; `mllm.evaluation.answer_table` makes a table of
evaluation lines.

Shapes: n questions, K budgets from the cheapest to the dearest, F features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mllm.budget import Budget

Unit = Literal["tokens", "flops", "ms"]
"""What a cost is counted in: soft tokens, FLOPs of the whole request, or measured milliseconds of it."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class AnswerTable:
    """Holds n questions, each answered at the same K budgets.

    Args:
        budgets: K, cheapest first.
        sample_keys: (n) set and id of the sample of each question.
        media_keys: (n) equal where questions are about the same media. Questions of one picture or clip depend on each
            other, so this is the unit of every resampling, split and bound.
        tasks: (n) the task of each sample.
        kinds: (n) the kind of question, "" where the manifest does not say; of answers under noise its ratio.
        utility: (n, K) in [0, 1]: accuracy, or 1 - min(WER, 1) of speech.
        tokens: (n, K) soft tokens.
        confidence: (n, K) smallest probability of any token of the answer, in [0, 1].
        flops: (n, K) of the whole request asked alone: encoder, compressor, prefill, decoding; None where the model has
            no formula.
        milliseconds: (n, K) of the whole request; None where none were measured.
        snrs_db: (n) the noise that each sample was heard under, None for none; None where no answers are under noise.
        features: by block ("question", "media", ...), (n, F_block) each: what is known of a question before any budget
            is chosen. Without blocks, a table serves fixed budgets and oracles alone.
    """

    budgets: tuple[Budget, ...]
    sample_keys: tuple[tuple[str, str], ...]
    media_keys: tuple[str, ...]
    tasks: tuple[str, ...]
    kinds: tuple[str, ...]
    utility: Array
    tokens: Array
    confidence: Array
    flops: Array | None = None
    milliseconds: Array | None = None
    snrs_db: tuple[float | None, ...] | None = None
    features: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.sample_keys), len(self.budgets))
        for name in ("utility", "tokens", "confidence", "flops", "milliseconds"):
            values = getattr(self, name)
            assert values is None or values.shape == shape, (name, values.shape, shape)
        for name, block in self.features.items():
            assert block.ndim == 2, name
            assert len(block) == len(self.sample_keys), name

    def __len__(self) -> int:
        return len(self.sample_keys)

    def cost(self, unit: Unit) -> Array:
        """Return the cost of every answer (n, K) in a unit.

        Raises:
            ValueError: nobody has counted or measured it.
        """
        values = {"tokens": self.tokens, "flops": self.flops, "ms": self.milliseconds}[unit]
        if values is None:
            raise ValueError(f"the answers hold no {unit}; a budget can be chosen by tokens")
        return values

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> "AnswerTable":
        """Return the table of some of the questions, in the order given; a question may come more than once."""
        index = np.asarray(rows, np.intp)
        chosen = {}
        for name in (one.name for one in fields(self) if one.name not in ("budgets", "features")):
            values = getattr(self, name)
            if values is not None:
                chosen[name] = values[index] if isinstance(values, np.ndarray) else tuple(values[i] for i in index)
        return replace(self, **chosen, features={name: block[index] for name, block in self.features.items()})

    def at(self, budgets: Sequence[Budget]) -> "AnswerTable":
        """Return the table with the same budgets in another order.

        Raises:
            ValueError: other budgets.
        """
        if set(budgets) != set(self.budgets):
            held = "; ".join(map(str, self.budgets))
            raise ValueError(f"the answers are at {held}, and not at {'; '.join(map(str, budgets))}")
        columns = [self.budgets.index(budget) for budget in budgets]
        arrays = {name: getattr(self, name) for name in ("utility", "tokens", "confidence", "flops", "milliseconds")}
        moved = {name: values[:, columns] for name, values in arrays.items() if values is not None}
        return replace(self, budgets=tuple(budgets), **moved)

    def media_digests(self) -> list[str]:
        """Digest each media key, once, so that a file can say which media were used without naming them."""
        return [hashlib.sha256(key.encode()).hexdigest()[:16] for key in dict.fromkeys(self.media_keys)]

    def units(self) -> list[NDArray[np.intp]]:
        """List the rows of each media key, in order of appearance."""
        rows: dict[str, list[int]] = {}
        for number, key in enumerate(self.media_keys):
            rows.setdefault(key, []).append(number)
        return [np.asarray(numbers, np.intp) for numbers in rows.values()]
