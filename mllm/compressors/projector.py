"""Projectors: from the size of a compressor's features to the LLM's hidden size.

Knows sizes, and which budget an item has. Does not know how features were compressed.

Shapes: N items, K soft tokens, D feature size, H the LLM's hidden size.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mllm.compressors.moe_projector import MixtureProjector

Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Projector(nn.Sequential):
    """Linear - activation - Linear, with a LayerNorm behind it if asked for; one Linear where there is no hidden size.

    The parameters are numbered 0, 2 (and 3 for the norm), as in LLaVA, M3, Llama-MTSK and Omni-AVSR. The published
    Omni-AVSR models have no norm, those of Llama-MTSK have one.
    """

    def __init__(
        self,
        *,
        in_size: int,
        out_size: int,
        hidden_size: int | None,
        norm: bool = False,
        activation: Activation = "gelu",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"projector_activation={activation!r} is not one of: {', '.join(ACTIVATIONS)}")
        layers: list[nn.Module] = [nn.Linear(in_size, out_size)]
        if hidden_size is not None:
            layers = [nn.Linear(in_size, hidden_size), ACTIVATIONS[activation](), nn.Linear(hidden_size, out_size)]
        if norm:
            layers.append(nn.LayerNorm(out_size))
        super().__init__(*layers)


class ProjectorBank(nn.ModuleList):
    """One projector for all budgets, or one per trained budget.

    With one per budget every projector runs on every item and each item keeps the output of its own. That is a few
    small matrix products more than needed; in return every process touches every weight in every step (what DDP and
    ZeRO demand), nothing asks the device for numbers, and items of different budgets may share a batch.

    Args:
        projectors: one, or one per budget; each a `Projector` or a mixture of them.
        budgets: the rate (or count) each projector is for; nothing where one serves all.
    """

    def __init__(self, projectors: Sequence[nn.Module], *, budgets: tuple[int, ...] = ()) -> None:
        super().__init__(projectors)
        assert len(projectors) == max(len(budgets), 1), (len(projectors), budgets)
        self.budgets = budgets
        self.routing: Tensor | None = None

    def forward(self, features: Tensor, asked: Tensor) -> Tensor:
        """(N, K, D) -> (N, K, H), item i through the projector of the budget `asked[i]` (zero if there is none)."""
        if not self.budgets:
            out = self[0](features)
            self.routing = _routing(self[0])
            return out
        chosen = torch.zeros((), device=features.device, dtype=features.dtype)
        self.routing = None
        for budget, projector in zip(self.budgets, self, strict=True):
            chosen = chosen + keep_asked(projector(features), asked, budget)
            if (routing := _routing(projector)) is not None:
                routing = keep_asked(routing, asked, budget)
                self.routing = routing if self.routing is None else self.routing + routing
        return chosen

    def take_routing(self) -> Tensor | None:
        """(N, K, 2E + 1) of the last pass in training, where the projectors are mixtures; nothing is kept."""
        routing, self.routing = self.routing, None
        return routing


def _routing(projector: nn.Module) -> Tensor | None:
    return projector.take_routing() if isinstance(projector, MixtureProjector) else None


def keep_asked(soft: Tensor, asked: Tensor, budget: int) -> Tensor:
    """(N, K, H) with zeros for the items whose budget is another one."""
    return soft.masked_fill((asked != budget)[:, None, None], 0.0)
