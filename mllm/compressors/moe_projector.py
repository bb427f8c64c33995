"""Sends each soft token through a few of several projectors, chosen by a router.

Knows sizes and single tokens. Does not know budgets, media, or how the losses that keep its experts in use are weighed.

    out = sum over the top k experts of gate * projector      gates = softmax over the experts, those k made to sum to 1

Every expert runs on every token, so that every process touches every weight in every step.

Shapes: N items, K soft tokens, D feature size, H the LLM's hidden size, E experts; B rows, S positions.
Source: Llama-SMoP (arXiv 2505.14336), with separate experts and routers per medium.
"""

import torch
from torch import Tensor, nn


class MixtureProjector(nn.Module):
    """Mixes projectors of one shape by their router.

    Args:
        experts: E of them.
        in_size: D.
        top_k: how many a token uses.

    Raises:
        ValueError: fewer experts than a token uses.
    """

    def __init__(self, experts: list[nn.Module], *, in_size: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= len(experts):
            raise ValueError(
                f"projector.top_k is {top_k}; with projector.num_experts={len(experts)} it is 1..{len(experts)}"
            )
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(in_size, len(experts), bias=False)
        self.top_k = top_k
        self.routing: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Projects (N, K, D) -> (N, K, H). In training `routing` (N, K, 2E + 1) is kept for `routing_losses`.

        `routing` holds, per token, E probabilities, E marks of the chosen experts, and the logsumexp of the logits.
        """
        logits = self.gate(features).float()
        probabilities = logits.softmax(dim=-1)
        top = probabilities.topk(self.top_k, dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, top.indices, 1.0)
        gates = (probabilities * chosen / top.values.sum(dim=-1, keepdim=True)).to(features.dtype)
        out = torch.stack([expert(features) for expert in self.experts], dim=-1)
        if self.training:
            self.routing = torch.cat([probabilities, chosen, logits.logsumexp(dim=-1, keepdim=True)], dim=-1)
        return (out * gates[..., None, :]).sum(dim=-1)

    def take_routing(self) -> Tensor | None:
        """Returns the routing of the last forward pass, and forgets it."""
        routing, self.routing = self.routing, None
        return routing


def routing_losses(routing: Tensor, is_token: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """Measures how unevenly the tokens of each row use the experts, and how large their logits have grown.

    The balance is E times the sum over experts of (share of the choices) * (mean probability), 1 where they are used
    alike (Switch Transformer, arXiv 2101.03961); the other is the mean of logsumexp(logits)^2 (ST-MoE, 2202.08906).
    Both are of a row and not of a batch, so that they do not depend on how rows are parted over processes.

    Args:
        routing: (B, S, 2E + 1), see `MixtureProjector.forward`.
        is_token: (B, S) bool, where there is a soft token.

    Returns:
        balance (B,) and z (B,), both 0 for a row without tokens.
    """
    num_experts = (routing.shape[-1] - 1) // 2
    is_token = is_token[..., None]
    num_tokens = is_token.sum(dim=1).clamp(min=1)
    means = routing.masked_fill(~is_token, 0.0).sum(dim=1) / num_tokens
    balance = num_experts * (means[:, :num_experts] * means[:, num_experts:-1] / top_k).sum(dim=-1)
    squares = routing[..., -1:].square().masked_fill(~is_token, 0.0).sum(dim=1) / num_tokens
    return balance, squares.squeeze(-1)
