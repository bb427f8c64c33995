"""`mllm data balance` reports how evenly the batches of a run load its processes, before there are any."""

import json
from dataclasses import dataclass, field, replace

from mllm.budget import Budget
from mllm.commands.options import without_extras
from mllm.config.model import check_at_least
from mllm.config.run import RunConfig

SUMMARY = "Tell how evenly a run's batches load several ranks, at every budget."
POSITIONAL = "manifest"


@dataclass(frozen=True, kw_only=True)
class Settings(RunConfig):
    """Go through the batches of a run, without a model, and count the tokens of every rank in every step."""

    manifest: list[str] = field(default_factory=list)
    """Manifests to look at instead of data.train."""
    ranks: int = 8
    """Number of processes that share a step."""
    tokens_per_batch: int | None = None
    """Tokens per batch, in place of data.tokens_per_batch."""
    simulated_epochs: int = 1
    """Number of passes over the samples."""
    budgets: list[str] = field(default_factory=list)
    """Budgets to count at beside those the run samples; the largest, the smallest and the sampler's points when left
    out."""
    json: str | None = None
    """File that the figures are written into too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, ("ranks", "simulated_epochs"))
        for budget in self.budgets:
            Budget.parse(budget)


def run(settings: Settings) -> int:
    """Count and print."""
    from pathlib import Path

    from mllm.checkpoints.build import build_processor
    from mllm.commands.terminal import console
    from mllm.training.pipeline.balance import AS_SAMPLED, simulate
    from mllm.training.pipeline.dataset import build_sampler, extreme_budgets
    from mllm.training.pipeline.loaders import read_samples

    config = without_extras(RunConfig, settings)
    data = config.data
    if settings.manifest:
        data = replace(data, train=settings.manifest)
    if settings.tokens_per_batch is not None:
        data = replace(data, tokens_per_batch=settings.tokens_per_batch)
    config = replace(config, data=data)
    if data.stream is not None:
        raise ValueError("a stream has no epoch to go through; leave data.stream out, or give --manifest without it")
    processor = build_processor(config.model, limits=data.limits)
    samples = read_samples(data.train, data)
    sampler = build_sampler(config, processor.space)
    budgets = [Budget.parse(text) for text in settings.budgets] or extreme_budgets(sampler)
    loads = simulate(
        samples,
        processor,
        sampler,
        config=config,
        num_ranks=settings.ranks,
        epochs=settings.simulated_epochs,
        budgets=budgets,
    )
    facts = {name: load.facts() for name, load in loads.items()}
    steps = len(loads[AS_SAMPLED].tokens)
    console().print(f"{len(samples)} samples, {settings.ranks} ranks, {steps} steps")
    for line in (_table(facts), *_advice(facts, grouped=data.group_by_media)):
        console().print(line)
    if settings.json is not None:
        Path(settings.json).write_text(json.dumps({"steps": steps, **facts}, indent=1) + "\n", encoding="utf-8")
        console().print(f"written to {settings.json}")
    return 0


def _table(facts: dict[str, dict[str, object]]) -> object:
    """Tabulate one line per budget; max/mean is over ranks."""
    from rich.table import Table

    table = Table(caption="max/mean: the fullest rank of a step over the mean rank; 1 is even", caption_justify="left")
    table.add_column("budget")
    for name in ("tokens/rank/step", "max/mean", "worst step", "padded max/mean", "worst", "padding", "epoch, by rank"):
        table.add_column(name, justify="right")
    for name, load in facts.items():
        ranks = load["tokens_per_rank"]
        assert isinstance(ranks, list)
        spread = f"{min(ranks):,}..{max(ranks):,}"
        numbers = [f"{load[key]:.3f}" for key in ("imbalance", "worst", "padded_imbalance", "padded_worst")]
        table.add_row(
            name, f"{load['mean_tokens']:,.0f}", *numbers, f"{100 * float(str(load['padding'])):.1f} %", spread
        )
    return table


def _advice(facts: dict[str, dict[str, object]], *, grouped: bool) -> list[str]:
    worst = max(facts, key=lambda name: float(str(facts[name]["imbalance"])))
    value = float(str(facts[worst]["imbalance"]))
    if value <= 1.05:
        return []
    hint = "" if grouped else "; data.group_by_media keeps rows that cost alike at every budget together"
    return [f"at {worst} ranks wait for the fullest: {100 * (value - 1):.0f} % of a step's tokens{hint}"]
