"""The learned token that ends a row of tiles or of their tokens.

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
        """Normal, as long as an embedding of standard deviation 1 / sqrt(H)."""
        nn.init.normal_(self.vector, std=len(self.vector) ** -0.5)

    def forward(self) -> Tensor:
        """(H,). A copy, and by a call, so that sharded parameters are gathered for it."""
        return self.vector.clone()
