"""Learns the token that ends a row of tiles or of their tokens.

Knows the LLM's hidden size. Does not know tiles or where it is put (`mllm.processing.token_order`).
"""

import torch
from torch import Tensor, nn


class Newline(nn.Module):
    """One vector (H,) as wide as the LLM. Source: LLaVA-NeXT's `image_newline`, with its initial spread."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws from a normal distribution of standard deviation 1 / sqrt(H), as an embedding has it."""
        nn.init.normal_(self.vector, std=len(self.vector) ** -0.5)

    def forward(self) -> Tensor:
        """Returns the vector (H,): a copy, and by a call, so that sharded parameters are gathered for it."""
        return self.vector.clone()
