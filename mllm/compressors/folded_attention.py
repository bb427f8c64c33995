"""Folds queries whose keys are positions: their attention is the same for every image, so it is computed once.

Knows the weights of one cross-attention and its projection. Does not know budgets beyond the number of queries.

With z the normed features without scale and shift, head h of the unfolded module gives A_h (z diag(g) W_h^T + c_h),
where A_h = softmax(Q_h K_h^T / sqrt(d)) depends on weights alone and its rows sum to 1. Hence A_h is kept, the norm's
scale g goes into the value weights, its shift and all biases into one constant vector, and the output projection and
the projection to the LLM, which follow each other without anything between, become one matrix. Nothing is approximated.

Which product comes first depends on the number of tokens n: pooling z per head and projecting what was pooled takes
n h T C + n C C multiply-adds, projecting all features and pooling values T C C + n T C. The cheaper one runs.

Shapes: N items, T features, M queries, n of them in use, h heads of size d, C = h * d, H the LLM's hidden size.
Source: that MQT's attention (arXiv 2405.19315) does not look at the image is seen in its released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Folded:
    """The constants that one cross-attention and its projection fold into.

    Args:
        attention: (h, M, T).
        value: (C, C), rows by head.
        output: (C, H).
        constant: (H,).
    """

    attention: Tensor
    value: Tensor
    output: Tensor
    constant: Tensor

    @classmethod
    def of(cls, attn: Any, query: Tensor, key: Tensor, norm: nn.LayerNorm, proj: Tensor) -> "Folded":
        """Folds in float32 or better and keeps the result in the dtype of the weights.

        Args:
            attn: a `CrossAttention`.
            query: (M, C), normed.
            key: (T, C), normed.
            norm: the norm of the values.
            proj: (C, H).
        """
        # Products of weights would add a rounding error that the unfolded module does not make.
        wide = torch.promote_types(proj.dtype, torch.float32)
        weights, biases = attn.in_proj_weight.to(wide).chunk(3), attn.in_proj_bias.to(wide).chunk(3)
        queries, keys = (
            functional.linear(states.to(wide), weight, bias).unflatten(1, (attn.num_heads, -1)).transpose(0, 1)
            for states, weight, bias in zip((query, key), weights, biases, strict=False)
        )
        attention_hMT = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(dim=-1)
        output_CH = attn.out_proj.weight.to(wide).T @ proj.to(wide)
        # Rows of the attention sum to 1, so a shift of every value passes through it unchanged: the norm's shift and
        # the biases need no features, and end in one vector that is added to every token.
        shift_C = weights[2] @ norm.bias.to(wide) + biases[2]
        constant_H = shift_C @ output_CH + attn.out_proj.bias.to(wide) @ proj.to(wide)
        # The norm's scale acts on the columns of the value weights.
        value_CC = weights[2] * norm.weight.to(wide)
        return cls(*(part.to(proj.dtype) for part in (attention_hMT, value_CC, output_CH, constant_H)))

    def __call__(self, normed: Tensor, num_tokens: int) -> Tensor:
        """Reads features (N, T, C), normed without scale and shift, with the first n queries: (N, n, H)."""
        attention = self.attention[:, :num_tokens]
        heads, count, length = attention.shape
        size = normed.shape[2]
        if pools_first(count, num_heads=heads, length=length, size=size):
            # Every head pools the whole features, (N, h * n, C), and only what is left is projected to its d values.
            pooled_NhnC = (attention.flatten(0, 1) @ normed).unflatten(1, (heads, count))
            read_Nhnd = pooled_NhnC @ self.value.unflatten(0, (heads, -1)).mT
        else:
            # All features are projected to values, and every head pools its d of them.
            read_Nhnd = attention @ functional.linear(normed, self.value).unflatten(2, (heads, -1)).transpose(1, 2)
        return read_Nhnd.transpose(1, 2).flatten(2) @ self.output + self.constant


def pools_first(num_tokens: int, *, num_heads: int, length: int, size: int) -> bool:
    """Tells whether pooling features per head takes fewer multiply-adds than pooling values."""
    pooling = num_tokens * num_heads * length * size + num_tokens * size * size
    return pooling < length * size * size + num_tokens * length * size


class FoldCache:
    """Keeps constants for as long as the weights they were made of are the very same, unchanged.

    A change in place, a load, another dtype or device, and a swapped weight are all seen without looking at values.
    Only a write through `.data` is not; `clear`, which a module calls when its mode changes, forgets everything.
    """

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: Any) -> "FoldCache":
        return FoldCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldCache, ()

    def clear(self) -> None:
        """Forgets everything."""
        self._kept: Any = None
        self._versions: tuple[int, ...] = ()
        self._seen: tuple[Tensor, ...] = ()

    def get(self, weights: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """Returns what `make` gives for these weights, made anew only if they changed."""
        versions = tuple(weight._version for weight in weights)
        if versions != self._versions or not all(
            weight.data_ptr() == seen.data_ptr() and weight.dtype == seen.dtype and weight.device == seen.device
            for weight, seen in zip(weights, self._seen, strict=True)
        ):
            # Aliases keep the storage alive, so that no later weight can lie at the same address.
            self._kept, self._versions = make(), versions
            self._seen = tuple(weight.detach() for weight in weights)
        return self._kept


def can_fold(weights: Sequence[Tensor]) -> bool:
    """Tells whether constants may stand for these weights now: no gradient is needed, and each is here and whole."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # ZeRO-3 leaves empty tensors behind, and inference tensors do not count their changes.
    return all(weight.numel() > 0 and not weight.is_inference() for weight in weights)
