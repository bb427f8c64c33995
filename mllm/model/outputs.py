"""Holds what passes between the parts of an elastic model: features of media, the loss of targets, the output.

Knows tensors only. Does not know how anything is computed.

Shapes: B rows, N encoded media items, T features of the longest item, D an encoder's feature size, H the LLM's hidden
size, L layers, K budgets or kinds of tokens, P targets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass(frozen=True)
class Features:
    """Holds what an encoder gave: values (N, T, D), true lengths (N,); grids (N, 2) where they differ."""

    values: Tensor
    lengths: Tensor
    grids: Tensor | None = None


class TargetLoss(Protocol):
    """Computes the loss of hidden states inside the forward pass, so that their logits need not all exist at once.

    It has to run there: where weights are sharded, the head can be read only while the wrapped model runs.
    """

    def __call__(self, head: Callable[[Tensor], Tensor], hidden_PH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar to differentiate, and the detached losses summed by budget (K,)."""
        ...


@dataclass
class ElasticOutput(CausalLMOutputWithPast):
    """Holds what the model gives, and what its adapter reports.

    Args:
        auxiliary: what is to be made small beside the loss, by name, each (B,); `auxiliary_weights` says how much it
            counts. `balance`: how unevenly a row's tokens use the experts, the mean over layers; 1 is even.
            `<medium>_balance`, `<medium>_z`: the same of a mixture of projectors, and how large its logits are.
        expert_usage: (L, B, K, N) how often tokens of each kind (`mllm.adapters.adapter_inputs.TOKEN_KINDS`) chose each
            of the N routed experts in each of the L layers.
        budget_losses: (K,) with a `target_loss`, what it gave beside the loss.
        target_states: (P, H) with a `target_loss`, the hidden states that it was given, detached.
    """

    auxiliary: dict[str, Tensor] | None = None
    expert_usage: Tensor | None = None
    budget_losses: Tensor | None = None
    target_states: Tensor | None = None
