"""Embeds the tokens that a model adds to a frozen LLM's vocabulary, such as the marks around a medium.

Knows token ids and an embedding. Does not know text, media, or what the tokens are for.

The LLM's own table stays as it is, bit for bit: a new token never reads it, whether the table is too short for its id
or has a spare row there that nobody ever trained. Only the rows here learn, and only they are saved. They stand on the
input side alone. A head, tied or not, keeps its old weight and its old number of logits, because a new token marks what
people put in and is never an answer; so nothing about the LLM's answers changes but what it reads. An exported model
keeps its rows here too: in the LLM's table they would give a tied head logits that it must never choose.

Shapes: N new tokens, B rows, S positions, H the LLM's hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init


class NewTokens(nn.Module):
    """Embeds ids, each new token by a row (H,) of its own.

    Args:
        token_ids: of the new tokens, one per row.
        size: H.
        std: of the rows until they are given their values.
    """

    def __init__(self, token_ids: Sequence[int], *, size: int, std: float) -> None:
        super().__init__()
        self.token_ids = tuple(token_ids)
        self.std = std
        self.rows = nn.Parameter(torch.empty(len(self.token_ids), size))
        if not self.rows.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the rows as the LLM's own were before they were trained."""
        init.normal_(self.rows, std=self.std)

    def forward(self, input_ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Embed ids (B, S) as (B, S, H) in the dtype of the LLM's own embeddings.

        Args:
            embed: the LLM's own embedding; it sees 0 in place of every new token.
        """
        # Counted from 1. Comparing with a few numbers needs no table on the device, which would have to be moved there,
        # and looks at no value, so that the host does not wait.
        number = torch.zeros_like(input_ids)
        for row, token_id in enumerate(self.token_ids, start=1):
            number = number.masked_fill(input_ids == token_id, row)
        is_new = number > 0
        embeds = embed(input_ids.masked_fill(is_new, 0))
        # Read also where there is no new token: every process has to touch every weight in every step.
        new_embeds = functional.embedding((number - 1).clamp(min=0), self.rows).to(embeds.dtype)
        return torch.where(is_new[..., None], new_embeds, embeds)


def mean_of_pieces(pieces: Tensor) -> Tensor:
    """Average the embeddings (P, H) of a text's pieces to a vector (H,) that is as long as they are.

    A mean of unlike vectors is shorter than each of them, and layers that normalise what they read are not made for
    short ones.
    """
    mean = pieces.mean(dim=0)
    return mean * pieces.norm(dim=1).mean() / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
