"""Projects a compressor's features to the LLM's hidden size.

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
            raise ValueError(f"projector.activation={activation!r} is not one of: {', '.join(ACTIVATIONS)}")
        layers: list[nn.Module] = [nn.Linear(in_size, out_size)]
        if hidden_size is not None:
            layers = [nn.Linear(in_size, hidden_size), ACTIVATIONS[activation](), nn.Linear(hidden_size, out_size)]
        if norm:
            layers.append(nn.LayerNorm(out_size))
        super().__init__(*layers)


class ProjectorBank(nn.ModuleList):
    """Holds one projector for all budgets, or one per trained budget.

    With one per budget every projector runs on every item and each item keeps the output of the right one. That is a
    few small matrix products more than needed; in return every process touches every weight in every step (what DDP
    and ZeRO demand), nothing asks the device for numbers, and items of different budgets may share a batch.

    Args:
        projectors: one, or one per budget; each a `Projector` or a mixture of them.
        budgets: the rate (or count) each projector is for; empty where one serves all.
    """

    def __init__(self, projectors: Sequence[nn.Module], *, budgets: tuple[int, ...] = ()) -> None:
        super().__init__(projectors)
        assert len(projectors) == max(len(budgets), 1), (len(projectors), budgets)
        self.budgets = budgets
        self.routing: Tensor | None = None

    def forward(self, features: Tensor, item_budgets: Tensor) -> Tensor:
        """Projects (N, K, D) -> (N, K, H), item i by the projector of `item_budgets[i]` (zero if there is none)."""
        if not self.budgets:
            out = self[0](features)
            self.routing = _routing(self[0])
            return out
        chosen = torch.zeros((), device=features.device, dtype=features.dtype)
        self.routing = None
        for budget, projector in zip(self.budgets, self, strict=True):
            chosen = chosen + keep_budget(projector(features), item_budgets, budget)
            if (routing := _routing(projector)) is not None:
                routing = keep_budget(routing, item_budgets, budget)
                self.routing = routing if self.routing is None else self.routing + routing
        return chosen

    def take_routing(self) -> Tensor | None:
        """Returns the routing (N, K, 2E + 1) of the last pass in training, for mixtures, and forgets it."""
        routing, self.routing = self.routing, None
        return routing


def _routing(projector: nn.Module) -> Tensor | None:
    return projector.take_routing() if isinstance(projector, MixtureProjector) else None


def keep_budget(soft: Tensor, item_budgets: Tensor, budget: int) -> Tensor:
    """Puts zeros where an item's budget is another one: (N, K, H) -> (N, K, H)."""
    return soft.masked_fill((item_budgets != budget)[:, None, None], 0.0)
