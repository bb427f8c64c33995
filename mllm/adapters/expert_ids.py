"""Tells which experts of an adapter a row uses: names of scales and tasks, and the ids that stand for them.

Knows budgets and media. Does not know modules or how an expert is computed.

A scale is the budget of a row by medium, `audio=/4,video=/2`; a task is which media a row holds (`asr`, `vsr`,
`avsr`), or the task its sample names. An id is an index into the list of names, or -1 for a row without media.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mllm.budget import MEDIA, Amount, Budget, Space, TokenCount
from mllm.config.model import AdapterConfig, GatedLoraConfig, LoraBankConfig, MomeConfig

NO_EXPERT = -1
"""The id of a row that only the shared expert serves."""
REDUCED = "reduced"
"""The one scale of a gated LoRA: every budget below the full one."""
TASKS_OF_MEDIA = {("audio",): "asr", ("video",): "vsr", ("audio", "video"): "avsr"}
"""The task of a row by the media it holds, unless its sample names one of the adapter's tasks."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "ms": ("shared",),
    "ss": ("scale",),
    "mss": ("shared", "scale"),
    "s": ("shared",),
    "t": ("task",),
    "st": ("shared", "task"),
}
"""Kinds of experts by variant: Llama-MTSK (arXiv 2503.06362) has scales, Omni-AVSR (arXiv 2511.07253) has tasks."""
MOST_SCALES = 64


def kinds_of(variant: str) -> tuple[str, ...]:
    """Tells which kinds of experts a variant has.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"adapter.variant is {variant!r}; allowed: {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def num_experts(bank: LoraBankConfig) -> int:
    """Counts the LoRA experts that a bank stacks."""
    return ("shared" in kinds_of(bank.variant)) + len(bank.scales) + len(bank.tasks)


@dataclass(frozen=True)
class ExpertNames:
    """Names the scales and the tasks that have an expert each; a tuple is empty where the adapter has no such kind."""

    scales: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def scale_id(self, counts: Sequence[tuple[str, TokenCount]], *, is_full: bool = False) -> int:
        """Finds the scale of a row whose media have these token counts.

        Args:
            is_full: every medium of the row keeps all of its features.

        Raises:
            ValueError: a scale without an expert, or items of one medium at different amounts.
        """
        if not counts:
            return NO_EXPERT
        if self.is_gate:
            return NO_EXPERT if is_full else 0
        amounts: dict[str, Amount] = {}
        for medium, count in counts:
            amount = count.amount
            if amounts.setdefault(medium, amount) != amount:
                raise ValueError(f"{medium} has both {amounts[medium]} and {amount}; a row has one scale")
        name = str(Budget({medium: amounts[medium] for medium in MEDIA if medium in amounts}))
        if name not in self.scales:
            raise ValueError(f"the adapter has no expert for the scale {name}; trained are {' | '.join(self.scales)}")
        return self.scales.index(name)

    @property
    def is_gate(self) -> bool:
        """Tells whether there is one expert for all reduced budgets, and none for the full one."""
        return self.scales == (REDUCED,)

    def task_id(self, task: str, media: Sequence[str]) -> int:
        """Finds the task of a row: the one its sample names where the adapter has it, else by the media it holds.

        Raises:
            ValueError: a task without an expert.
        """
        present = tuple(medium for medium in MEDIA if medium in media)
        name = task if task in self.tasks else TASKS_OF_MEDIA.get(present, "+".join(present))
        if not name:
            return NO_EXPERT
        if name not in self.tasks:
            raise ValueError(f"the adapter has no expert for the task {name}; trained are {', '.join(self.tasks)}")
        return self.tasks.index(name)


NO_EXPERT_NAMES = ExpertNames()


def expert_names_of(adapter: AdapterConfig | None) -> ExpertNames:
    """Return the names of the scales and tasks that an adapter has something for."""
    if isinstance(adapter, LoraBankConfig):
        return ExpertNames(tuple(adapter.scales), tuple(adapter.tasks))
    if isinstance(adapter, GatedLoraConfig):
        return ExpertNames((REDUCED,))
    return ExpertNames(tuple(adapter.scales)) if isinstance(adapter, MomeConfig) else NO_EXPERT_NAMES


def scales_of(names: Sequence[str], space: Space) -> list[str]:
    """Lists the scales of an adapter as a config writes them: those named, or every combination of the space.

    Raises:
        ValueError: a scale that is not one of the space's, or more of them than a bank should hold.
    """
    budgets = [Budget.parse(name) for name in names]
    if not budgets:
        trained = [medium_space.trained for medium_space in space.media.values()]
        budgets = [Budget(dict(zip(space.media, point, strict=True))) for point in itertools.product(*trained)]
    for budget in budgets:
        if not budget.amounts or budget.total_tokens is not None or not space.is_trained(budget):
            raise ValueError(f"model.adapter.scales holds {str(budget)!r}, which is not a point of the trained space")
    if len(budgets) > MOST_SCALES:
        raise ValueError(f"model.adapter.scales would be {len(budgets)} experts; name at most {MOST_SCALES} of them")
    return list(dict.fromkeys(str(budget) for budget in budgets))


def tasks_of(names: Sequence[str], space: Space) -> list[str]:
    """Lists the tasks of an adapter: those named, or those of every set of media the model takes."""
    if names:
        return list(dict.fromkeys(names))
    return [task for media, task in TASKS_OF_MEDIA.items() if set(media) <= set(space.media)]
