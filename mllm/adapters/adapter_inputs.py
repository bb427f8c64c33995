"""Passes per-row scale and task ids to the adapters inside an unmodified decoder.

Knows decoder layers by their `self_attn` or `linear_attn`. Does not know what an adapter computes.

The model passes one `AdapterInputs` as the keyword `adapter_inputs` of the LLM. Decoders of transformers pass unknown
keywords on to each layer and each layer to its attention, and there a hook takes it out and gives it to the adapters
of that layer. The hook is on the attention and not on the layer, because a layer's activations may be computed again in
the backward pass: transformers checkpoints a layer's `forward`, so hooks of the layer would not run again, while those
inside it do, with the keywords of the pass that is being repeated. So nothing is ever read that another pass has set.

Shapes: B rows, S positions, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm.budget import MEDIA
from mllm.packing.plan import SegmentPlan

KEYWORD = "adapter_inputs"
KINDS_WITH_INPUTS = ("lora_bank", "gated_lora", "mome")
"""Kinds of adapters whose computation depends on the rows."""
TOKEN_KINDS = ("text", *MEDIA)
"""What a token can be; its kind is an index into this list."""
NUM_KINDS = len(TOKEN_KINDS)


class Collector:
    """Gathers what the adapters of one forward pass report, layer by layer, until it is taken.

    A layer that is computed again in the backward pass reports too late, and that report is dropped.
    This is no dataclass: FSDP2 looks for gradients in the dataclasses a layer gets, and gives it copies of those that
    hold some, so that all layers but the first would report to a copy.

    Attributes:
        balance: (B,) per layer.
        usage: (B, K, N) per layer: how often tokens of each of K kinds chose each of N experts.
        is_open: reports are taken in.
    """

    def __init__(self) -> None:
        self.balance: list[Tensor] = []
        self.usage: list[Tensor] = []
        self.is_open = True

    def add(self, balance: Tensor, usage: Tensor) -> None:
        """Takes in the report of one layer."""
        if self.is_open:
            self.balance.append(balance)
            self.usage.append(usage)

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns everything reported, forgets it, and takes in nothing more."""
        taken = self.balance, self.usage
        self.balance, self.usage, self.is_open = [], [], False
        return taken


@dataclass(frozen=True)
class AdapterInputs:
    """Holds what adapters need to know of the rows of one forward pass.

    Args:
        scale_ids: (B,) or (B, S) int64, see `mllm.adapters.expert_ids`; None where the adapter has no scales.
        task_ids: (B,) or (B, S) int64, the same for tasks.
        kinds: (B, S) int64, indices into `TOKEN_KINDS`, -1 on padding; None where no adapter reports.
        collector: takes what adapters report.
        plan: how the rows lie where they are packed; B is then 1 in the shapes above, and reports are by row.
    """

    scale_ids: Tensor | None = None
    task_ids: Tensor | None = None
    kinds: Tensor | None = None
    collector: Collector | None = None
    plan: SegmentPlan | None = None


class Adapter(nn.Module):
    """Base of the adapters that depend on the rows: the hook sets `inputs` right before they run."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = AdapterInputs()
        self.is_enabled = True

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapter on or off; off is the frozen LLM bit for bit."""
        self.is_enabled = enabled


def decoder_layers(llm: nn.Module) -> list[nn.Module]:
    """Lists the layers of a decoder.

    Raises:
        ValueError: an LLM whose layers do not all have an attention, full or linear, and an `mlp`.
    """
    layers = list(getattr(llm, "layers", []))
    if not layers or not all(attention_of(layer) is not None and hasattr(layer, "mlp") for layer in layers):
        raise ValueError(
            f"{type(llm).__name__} has layers without self_attn or mlp; this adapter needs a decoder such as Llama, "
            "Qwen or Gemma"
        )
    return layers


def attention_of(layer: nn.Module) -> Any:
    """Returns what mixes the tokens of a layer: its attention, or linear attention as Qwen3.5 has it in most layers."""
    return getattr(layer, "self_attn", None) or getattr(layer, "linear_attn", None)


def connect(layer: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Lets the attention of a layer pass the adapter inputs it gets to the adapters of that layer."""
    attention = attention_of(layer)
    attention.served_adapters = tuple(adapters)  # a tuple, so that they are not registered as its children
    attention.register_forward_pre_hook(_pass_adapter_inputs, with_kwargs=True)


def _pass_adapter_inputs(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    inputs = kwargs.pop(KEYWORD, None) or AdapterInputs()
    for adapter in attention.served_adapters:
        adapter.inputs = inputs
    return args, kwargs
