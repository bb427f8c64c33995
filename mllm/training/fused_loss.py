"""Computes the same loss by Liger's fused kernel, from hidden states and the head's matrix, without all logits.

Knows Liger, the head and the weights of targets. Does not know training batches, configs or the trainer.

Liger multiplies by the head's matrix a few targets at a time, and overwrites their logits with the gradients. Targets
weigh differently, so a loss per target is asked for; its gradients are computed in the backward pass, from logits that
are made again, since what has been summed over targets cannot be weighed any more. Before 0.8.2 Liger weighed the sums:
the loss was right and the gradients were not, so older versions are refused. In bfloat16 the weights are rounded too.
Liger waits for the device once in each direction, for a count of targets that a loss per target does not use.

Shapes: P target tokens, H hidden size, V vocabulary, K budgets; see `loss.py`.
Source: Liger Kernel (arXiv 2410.10989).
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from mllm.training.loss import Head, WeightedTargets, weighted_loss
from mllm.utils.extras import install_line

VERSIONS = ">=0.8.2,<0.9"
"""Of liger-kernel; the gradients of losses per target are wrong before."""


def check_liger(*, on_cpu: bool) -> None:
    """Check that Liger is there and has a GPU to run on.

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
    """Return the head of a model, if the kernel computes the same logits: one whole matrix and nothing after it.

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


@dataclass(frozen=True)
class FusedTargetLoss:
    """Computes what `ChunkedTargetLoss` does without distillation, by Liger's kernel.

    Args:
        targets: of the hidden states.
        num_targets: target tokens of the optimizer step, see `loss_of_logits`.
        linear: the head as a layer, see `plain_head`.
    """

    targets: WeightedTargets
    num_targets: int | Tensor
    linear: nn.Linear

    def __call__(self, head: Head, hidden_PH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the cross-entropy summed per budget (K,); `head` is used where there are no targets only.

        Raises:
            ValueError: a head that has been put in shards meanwhile.
        """
        _check_whole(self.linear)
        if (
            len(hidden_PH) == 0
        ):  # a kernel cannot be started for nothing, but the head must have its gradient of nothing
            per_token = head(hidden_PH).float().sum(dim=-1)
        else:
            kernel = _import_liger()
            weight, ids = self.linear.weight, self.targets.ids
            per_token = kernel(hidden_PH, weight, ids, reduction="none", accum_dtype=torch.float32)
        loss = weighted_loss(per_token.detach(), per_token, self.targets, self.num_targets)
        return loss.total, loss.budget_losses


def _check_whole(head: nn.Linear) -> None:
    """Refuse a head in shards: ZeRO-3 gathers weights when their layer is called, which the kernel does not do."""
    if hasattr(head.weight, "ds_id"):
        raise ValueError("train.loss_kernel is liger, but ZeRO-3 keeps the head in shards; use ZeRO-2, or torch")


def _import_liger() -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy
