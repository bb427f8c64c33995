"""Says which validation of a run was the best and when it no longer improves, and keeps what was trained then.

Knows names of figures, a log of validations, and the folder `best` of a run. Does not know how figures come about.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mllm.checkpoints.load import save_run
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor
from mllm.utils.run_paths import BEST

Goal = Literal["lowest", "highest"]
GOALS: dict[str, Goal] = {"loss": "lowest", "wer": "lowest", "cer": "lowest", "accuracy": "highest"}
"""By the first word of a figure, what is best."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """Says how the last validation of a run stands among all.

    Args:
        name: of the figure.
        best, best_step: the best value so far, and the step it was found after.
        num_since: validations since then; 0 where the last one is the best.
    """

    name: str
    best: float
    best_step: int
    num_since: int

    @property
    def is_best(self) -> bool:
        """Tell whether the last validation is the best."""
        return self.num_since == 0

    def __str__(self) -> str:
        since = f", no better in {self.num_since} validations since" if self.num_since else ""
        return f"best {self.name} {self.best:.4g} after step {self.best_step}{since}"


@dataclass(frozen=True)
class Selection:
    """Chooses among the validations of a run by one figure.

    Args:
        name: of the figure, as the log has it without `eval_`.
        goal: which value is best.
        patience: after how many validations without a better one a run is over; None never ends it.
    """

    name: str
    goal: Goal
    patience: int | None = None

    @classmethod
    def of(
        cls, name: str, *, best_is: Literal["auto", "lowest", "highest"] = "auto", patience: int | None = None
    ) -> "Selection":
        """Read what a run config says.

        Raises:
            ValueError: `auto` with a figure that is not known.
        """
        figure = name.partition("/")[0]
        if best_is == "auto" and figure not in GOALS:
            raise ValueError(
                f"train.best_metric is {name!r}; of {', '.join(GOALS)} it is known what is best, of others say "
                "train.best_is: lowest or highest"
            )
        return cls(name, GOALS[figure] if best_is == "auto" else best_is, patience)

    def standing(self, history: Sequence[Mapping[str, Any]]) -> Standing:
        """Find the best validation; of equal ones the first.

        Args:
            history: the reports of a run in their order, at least one of them a validation; a resumed run brings those
                of the run before.

        Raises:
            ValueError: the last validation has no such figure; those it has are named.
        """
        validations = [row for row in history if "eval_loss" in row]
        key = f"eval_{self.name}"
        if key not in validations[-1]:
            names = [name.removeprefix("eval_") for name in validations[-1] if name.startswith("eval_")]
            raise ValueError(f"train.best_metric is {self.name!r}; the validation has {', '.join(names)}")
        # What is no number is never the best, and a run may have begun without the figure.
        values = [row.get(key, math.nan) for row in validations]
        worst = math.inf if self.goal == "lowest" else -math.inf
        ranked = [worst if math.isnan(value) else value for value in values]
        best = min(ranked) if self.goal == "lowest" else max(ranked)
        index = ranked.index(best)
        return Standing(self.name, values[index], int(validations[index]["step"]), len(values) - 1 - index)

    def is_over(self, standing: Standing) -> bool:
        """Tell whether a run has waited long enough for a better validation."""
        return self.patience is not None and standing.num_since >= self.patience


def keep_best(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    run: Path,
    trainables: Mapping[str, Tensor],
    standing: Standing,
) -> None:
    """Write the model as it is to the folder `best` of a run, in place of the one before."""
    sources = model.config.sources
    save_run(model, processor, run / BEST, state=trainables)
    model.config.sources = sources  # saving noted where parts are as seen from that folder
    logger.info("%s: kept in %s", standing, run / BEST)
