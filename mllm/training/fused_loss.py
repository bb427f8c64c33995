"""The same loss by Liger's fused kernel: hidden states and the head's matrix to cross-entropies, without all logits.

Knows Liger, the head and what targets are worth. Does not know lessons, settings or the trainer.

Liger multiplies by the head's matrix a few targets at a time, and overwrites their logits with the gradients. Targets
weigh differently, so a loss per target is asked for; its gradients are computed in the backward pass, from logits that
are made again, since what has been summed over targets cannot be weighed any more. Before 0.8.2 Liger weighed the sums:
the loss was right and the gradients were not, so older versions are refused. In bfloat16 the weights are rounded too.
Liger waits for the device once in each direction, for a count of targets that a loss per target does not use.

Shapes: P target tokens, H hidden size, V vocabulary, K budgets; see `objective.py`.
Source: Liger Kernel (arXiv 2410.10989).
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from mllm.training.loss import Head, Supervision, weighted
from mllm.utils.extras import install_line

VERSIONS = ">=0.8.2,<0.9"
"""Of liger-kernel; the gradients of losses per target are wrong before."""


def check_liger(*, on_cpu: bool) -> None:
    """See that Liger is there and has a GPU to run on.

    Raises:
        ValueError: no GPU, or Liger is missing, broken or of another version; says how to get it.
    """
    if on_cpu:
        raise ValueError("train.loss_kernel is liger, which needs a CUDA device, but this run is on the CPU; use torch")
    try:
        installed = version("liger-kernel")
    except PackageNotFoundError:
        raise ValueError(
            f"train.loss_kernel is liger, but liger-kernel is not installed: {install_line('liger')}"
        ) from None
    if not SpecifierSet(VERSIONS).contains(installed, prereleases=True):
        raise ValueError(
            f"train.loss_kernel is liger, but liger-kernel {installed} is not {VERSIONS}: {install_line('liger')}"
        )
    try:
        _import_liger()
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"train.loss_kernel is liger, but liger-kernel cannot be imported: {error}") from error


def plain_head(model: Any) -> nn.Linear:
    """The head of a model, if the kernel computes the same logits: one whole matrix and nothing after it.

    Args:
        model: an `ElasticForConditionalGeneration`.

    Raises:
        ValueError: logits that are capped, another head than a linear layer without bias, or one in shards.
    """
    text = model.config.get_text_config()
    if (cap := getattr(text, "final_logit_softcapping", None)) is not None:
        raise ValueError(
            f"train.loss_kernel is liger, but {text.model_type} caps its logits (final_logit_softcapping {cap}), which "
            "has not been tested with it; use torch"
        )
    head = model.lm_head
    if type(head) is not nn.Linear or head.bias is not None:  # an adapter or a quantised layer may be a kind of Linear
        raise ValueError(
            f"train.loss_kernel is liger, but the head is {type(head).__name__}; it must be a linear layer without "
            "bias and adapter, or use torch"
        )
    _check_whole(head)
    return head


def read_fused(
    head: Head, hidden: Tensor, *, linear: nn.Linear, supervision: Supervision, num_targets: int | Tensor
) -> dict[str, Tensor]:
    """What `read_hidden` gives without distillation.

    Args:
        head: hidden states (n, H) -> logits (n, V); used where there are no targets only.
        hidden: (P, H).
        linear: the same as a layer, see `plain_head`.

    Raises:
        ValueError: a head that has been put in shards meanwhile.
    """
    _check_whole(linear)
    if len(hidden) == 0:  # a kernel cannot be started for nothing, but the head must have its gradient of nothing
        per_token = head(hidden).float().sum(dim=-1)
    else:
        per_token = _import_liger()(hidden, linear.weight, supervision.ids, reduction="none", accum_dtype=torch.float32)
    loss = weighted(per_token.detach(), per_token, supervision, num_targets)
    return {"loss": loss.total, "sums": loss.sums, "hidden": hidden.detach()}


def _check_whole(head: nn.Linear) -> None:
    """ZeRO-3 gathers weights when their layer is called, and the kernel takes the matrix without calling it."""
    if hasattr(head.weight, "ds_id"):
        raise ValueError("train.loss_kernel is liger, but ZeRO-3 keeps the head in shards; use ZeRO-2, or torch")


def _import_liger() -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy
