"""Folds queries whose keys are positions: their attention is the same for every image, so it is computed once.

Knows the weights of one cross-attention and its projection. Does not know budgets beyond the number of queries.

With z the normed features, head h of the unfolded module gives A_h (z W_h^T + c_h), where A_h = softmax(Q_h K_h^T /
sqrt(d)) depends on weights alone and its rows sum to 1. Hence A_h is kept, all biases go into one constant vector, and
the output projection and the projection to the LLM, which follow each other without anything between, become one
matrix. Nothing is approximated. The norm's scale and shift stay with the norm: torch has no faster one without them.

Which product comes first depends on the number of tokens n: pooling z per head and projecting what was pooled takes
n h T C + n C C multiply-adds, projecting all features and pooling values T C C + n T C. The cheaper one runs.

Shapes: N items, T features, M queries, n of them in use, h heads of size d, C = h * d, H the LLM's hidden size.
Source: that MQT's attention (arXiv 2405.19315) does not look at the image is seen in its released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Folded:
    """The constants that one cross-attention and its projection fold into.

    Args:
        attention: (h, M, T).
        value: (C, C), rows by head; the module's own weights.
        value_by_head: (h, C, d), the same in the order that is read fastest where few tokens are projected.
        output: (H, C).
        constant: (H,).
    """

    attention: Tensor
    value: Tensor
    value_by_head: Tensor
    output: Tensor
    constant: Tensor

    @classmethod
    def of(cls, attn: Any, query: Tensor, key: Tensor, proj: Tensor) -> "Folded":
        """Folds in float32 or better and keeps the result in the dtype of the weights.

        Args:
            attn: a `CrossAttention`.
            query: (M, C), normed.
            key: (T, C), normed.
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
        output_HC = proj.to(wide).T @ attn.out_proj.weight.to(wide)
        # Rows of the attention sum to 1, so a shift of every value passes through it unchanged: the biases need no
        # features, and end in one vector that is added to every token.
        constant_H = output_HC @ biases[2] + attn.out_proj.bias.to(wide) @ proj.to(wide)
        value_CC = attn.in_proj_weight.chunk(3)[2]
        return cls(
            attention=attention_hMT.to(proj.dtype),
            value=value_CC,
            value_by_head=value_CC.unflatten(0, (attn.num_heads, -1)).mT.contiguous(),
            output=output_HC.to(proj.dtype),
            constant=constant_H.to(proj.dtype),
        )

    def __call__(self, normed: Tensor, num_tokens: int) -> Tensor:
        """Reads normed features (N, T, C) with the first n queries: (N, n, H)."""
        attention = self.attention[:, :num_tokens]
        heads, count, length = attention.shape
        size = normed.shape[2]
        if pools_first(count, num_heads=heads, length=length, size=size):
            # Every head pools the whole features, (N, h * n, C), and only what is left is projected to its d values.
            pooled_NhnC = (attention.flatten(0, 1) @ normed).unflatten(1, (heads, count))
            read_Nhnd = pooled_NhnC @ self.value_by_head
        else:
            # All features are projected to values, and every head pools its d of them.
            read_Nhnd = attention @ functional.linear(normed, self.value).unflatten(2, (heads, -1)).transpose(1, 2)
        return functional.linear(read_Nhnd.transpose(1, 2).flatten(2), self.output, self.constant)


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
