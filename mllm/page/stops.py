"""Defines where a slider stops: the trained budgets of one medium, with what each costs.

Knows the rows of `mllm.serving.budget_table`. Does not know pages, models or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mllm.evaluation.bench import some_of


@dataclass(frozen=True)
class Stop:
    """One trained budget of one medium.

    Args:
        budget: as the grammar writes it.
        tokens: soft tokens of an item, of `seconds` where it is a stream.
        flops: of one request; None where there is no formula for the model.
        milliseconds: of one request, as measured at the start; None where it was not.
    """

    budget: str
    tokens: int
    flops: float | None = None
    milliseconds: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Stop":
        """Read a row of the table of budgets."""
        return cls(row["budget"], row["tokens"], row["flops"], row["milliseconds"], row["seconds_of_media"])

    @property
    def line(self) -> str:
        """What is shown as the slider moves."""
        tokens = f"{self.tokens} soft token{'s' if self.tokens != 1 else ''}"
        per = "" if self.seconds is None else f" for {self.seconds:g} s"
        return f"{self.budget}: {tokens}{per} · {written_flops(self.flops)} · {self._time}"

    @property
    def _time(self) -> str:
        return "time not measured" if self.milliseconds is None else f"{self.milliseconds:.1f} ms measured"


def stops_of(table: Sequence[Mapping[str, Any]], medium: str) -> tuple[Stop, ...]:
    """List the stops of a medium's slider, fewest tokens first."""
    return tuple(Stop.of(row) for row in reversed(table) if row["type"] == medium)


def written_flops(flops: float | None) -> str:
    """Write FLOPs with the prefix that fits."""
    if flops is None:
        return "FLOPs not known"
    scale, prefix = next((unit for unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if flops >= unit[0]), (1e3, "k"))
    return f"{flops / scale:.3g} {prefix}FLOP"


def combinations(stops: Sequence[Sequence[Stop]]) -> tuple[list[tuple[Stop, ...]], int]:
    """List the budgets of a request with several media that are answered at side by side, fewest tokens first.

    Returns:
        all combinations of their stops, or of more than 8 those evenly spaced from the fewest tokens to the most; and
        how many there are.
    """
    together = sorted(product(*stops), key=lambda chosen: sum(stop.tokens for stop in chosen))
    return some_of(together), len(together)
