"""Puts a Mixture of Matryoshka Experts beside a frozen block: small experts, some shared and some routed.

Knows decoder layers and ids of scales. Does not know what a scale is, or how the balance loss is used.

    out = sum of the shared experts + sum over the top k routed experts of gate * expert
    expert = Linear(H, W) -> GELU -> Linear(W, H)        gate = softmax over the routed experts, not renormalised

Experts and router are those of all scales and media. Everything is computed dense, with the gates on the bottleneck, so
that a process touches every expert in every step; experts are so narrow that this is also fast.

Shapes: B rows, S positions, H the LLM's hidden size, W width of the bottleneck, N routed experts, M all experts, the
shared ones first, R routers, K kinds of tokens.
Source: MoME (arXiv 2510.04136).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm.adapters.adapter_inputs import NUM_KINDS, Adapter, Collector, attention_of, connect, decoder_layers
from mllm.utils.cpu_dtype import cpu_dtype

PLACEMENTS = ("attention", "ffn", "layer")
"""Which frozen block the experts stand beside: both take the block's own normalised input, and their outputs add."""


class Mome(Adapter):
    """Computes the experts and the router of one decoder layer.

    Args:
        hidden_size: H.
        num_experts: N.
        num_shared: experts every token uses.
        top_k: routed experts a token uses.
        bottleneck: W.
        renormalise: let the gates of a token's experts sum to 1.
        num_routers: 1, or one per scale.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        num_shared: int,
        top_k: int,
        bottleneck: int,
        renormalise: bool = False,
        num_routers: int = 1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_shared, self.top_k = num_experts, num_shared, top_k
        self.renormalise, self.num_routers = renormalise, num_routers
        num_all = num_shared + num_experts
        self.router = nn.Parameter(torch.empty(num_routers, num_experts, hidden_size, device=device))
        self.down = nn.Parameter(torch.empty(num_all, bottleneck, hidden_size, device=device))
        self.down_bias = nn.Parameter(torch.zeros(num_all, bottleneck, device=device))
        self.up = nn.Parameter(torch.zeros(num_all, hidden_size, bottleneck, device=device))
        self.up_bias = nn.Parameter(torch.zeros(num_all, hidden_size, device=device))
        for stacked in (self.router, self.down):
            for matrix in stacked:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.layer_input: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes what is added to the block's output: (B, S, H) -> (B, S, H)."""
        if hidden.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return self._forward(hidden, cpu_dtype(hidden.dtype))
        return self._forward(hidden, self.down.dtype)

    def _forward(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        values = hidden.to(dtype)
        probabilities = self._probabilities(values)
        top = probabilities.topk(self.top_k, dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, top.indices, 1.0)
        gates = probabilities * chosen
        if self.renormalise:
            gates = gates / top.values.sum(dim=-1, keepdim=True)
        if self.num_routers > 1:  # a row that is of no scale has no router
            gates = gates * (self._scale_ids()[..., None] >= 0)
        if self.inputs.collector is not None:
            self._report(self.inputs.collector, probabilities, chosen)
        # Shared experts have the gate 1. Since a gate scales a whole expert, it may stand on the bottleneck instead of
        # the output: all experts are then two products of matrices, and no (B, S, M, H) tensor is ever made.
        gates_BSM = torch.cat([gates.new_ones(*gates.shape[:-1], self.num_shared), gates], dim=-1)
        down, up = self.down.flatten(0, 1).to(dtype), self.up.transpose(0, 1).flatten(1).to(dtype)
        inner = functional.gelu(functional.linear(values, down, self.down_bias.flatten().to(dtype)))
        gates_BSM = gates_BSM.to(inner.dtype)
        inner_BSMW = inner.unflatten(-1, self.down.shape[:2]) * gates_BSM[..., None]
        out = functional.linear(inner_BSMW.flatten(-2), up) + gates_BSM @ self.up_bias.to(gates_BSM.dtype)
        return out.to(hidden.dtype)

    def _probabilities(self, values: Tensor) -> Tensor:
        """Computes the probabilities of the routed experts, (B, S, N) in float32."""
        with torch.autocast(values.device.type, enabled=False):  # rounded, other experts would be among the first k
            logits = functional.linear(values.float(), self.router.flatten(0, 1).float())
        if self.num_routers > 1:
            # All routers are computed and each row keeps that of its scale; a row of no scale takes the first here,
            # and its gates are zeroed by the caller.
            logits = logits.unflatten(-1, (self.num_routers, self.num_experts))
            router_ids = self._scale_ids().clamp(min=0)[..., None, None].expand(*logits.shape[:2], 1, self.num_experts)
            logits = logits.gather(2, router_ids).squeeze(2)
        return logits.softmax(dim=-1)

    def _scale_ids(self) -> Tensor:
        """Returns the scale ids as (B, 1) or (B, S)."""
        ids = self.inputs.scale_ids
        if ids is None:
            raise ValueError("the adapter has a router per scale, but scale_ids were not given")
        ids = ids.to(self.router.device)
        return ids[:, None] if ids.dim() == 1 else ids

    def _report(self, collector: Collector, probabilities: Tensor, chosen: Tensor) -> None:
        """Reports the balance loss of each row, 1 where its tokens use all experts alike, and which experts they chose.

        The loss is N times the sum over experts of (share of the choices) * (mean probability), over a row's tokens.
        """
        assert self.inputs.kinds is not None
        kinds = self.inputs.kinds.to(chosen.device)
        if (plan := self.inputs.plan) is not None:
            probabilities, chosen, kinds = plan.unpack(probabilities), plan.unpack(chosen), plan.unpack(kinds, -1)
        kinds = kinds[..., None] == torch.arange(NUM_KINDS, device=chosen.device)
        # Counts are sums and not a product of matrices, which autocast would compute in 8 bits of mantissa.
        usage = torch.where(kinds[..., None], chosen[..., None, :], 0.0).sum(dim=1)  # (B, K, N)
        is_token = kinds.any(dim=-1, keepdim=True).to(probabilities.dtype)
        num_tokens = is_token.sum(dim=1).clamp(min=1)
        usage_fractions = usage.sum(dim=1) / (self.top_k * num_tokens)
        means = (probabilities * is_token).sum(dim=1) / num_tokens
        collector.add(self.num_experts * (usage_fractions * means).sum(dim=-1), usage)


def inject_mome(
    module: nn.Module,
    *,
    placement: str,
    disjoint_routers: bool = False,
    scales: Sequence[str] = (),
    balance_weight: float = 0.01,
    seed: int = 0,
    **experts: Any,
) -> None:
    """Puts experts beside a block of every decoder layer.

    Args:
        module: the LLM's decoder.
        placement: see `PLACEMENTS`.
        disjoint_routers: a router per scale, of those named by `scales`, instead of one for all.
        balance_weight: factor of the balance loss; used by the trainer, and only checked here.
        experts: num_experts, num_shared, top_k, bottleneck and renormalise; see `Mome`.

    Raises:
        ValueError: numbers out of range, an unknown placement, or an LLM without decoder layers.
    """
    _check(placement, disjoint_routers, scales, balance_weight, experts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in decoder_layers(module):
            weight = next(layer.parameters())
            mome = Mome(
                module.config.hidden_size,  # pyright: ignore
                num_routers=len(scales) if disjoint_routers else 1,
                device=weight.device,
                **experts,
            )
            layer.mome = mome
            connect(layer, [mome])
            _hook_up(layer, mome, placement)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".mome." in name)


def _check(
    placement: str, disjoint_routers: bool, scales: Sequence[str], balance_weight: float, experts: dict[str, Any]
) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"adapter.placement is {placement!r}; allowed: {', '.join(PLACEMENTS)}")
    if disjoint_routers != bool(scales):
        raise ValueError(f"adapter.scales is {list(scales)}, but disjoint_routers is {disjoint_routers}")
    if balance_weight < 0:
        raise ValueError(f"adapter.balance_weight is {balance_weight}; it cannot be negative")
    for key, least in (("num_experts", 1), ("num_shared", 0), ("top_k", 1), ("bottleneck", 1)):
        if experts[key] < least:
            raise ValueError(f"adapter.{key} is {experts[key]}; it must be at least {least}")
    if experts["top_k"] > experts["num_experts"]:
        raise ValueError(f"adapter.top_k is {experts['top_k']}, but num_experts is {experts['num_experts']}")


# The hooks stand on blocks inside the layer, so that they run again where its activations are computed again.


def _hook_up(layer: Any, mome: Mome, placement: str) -> None:
    if placement == "attention":
        attention_of(layer).register_forward_hook(_beside_attention, with_kwargs=True)
        return
    # Gemma normalises the output of its feed-forward block before it is added; what follows that is the layer's output.
    last = getattr(layer, "post_feedforward_layernorm", layer.mlp) if placement == "layer" else layer.mlp
    last.served_adapters = (mome,)
    if placement == "ffn":
        last.register_forward_hook(_beside_ffn)
    else:
        attention_of(layer).register_forward_pre_hook(_keep_input, with_kwargs=True)
        last.register_forward_hook(_beside_layer)


def _beside_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    mome = attention.served_adapters[0]
    if not mome.is_enabled:
        return output
    added = mome(_hidden(args, kwargs))
    return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])  # linear_attn; self_attn


def _beside_ffn(block: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    mome = block.served_adapters[0]
    return output + mome(args[0]) if mome.is_enabled else output


def _keep_input(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mome = attention.served_adapters[0]
    mome.layer_input = _hidden(args, kwargs) if mome.is_enabled else None


def _beside_layer(block: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    mome = block.served_adapters[0]
    layer_input, mome.layer_input = mome.layer_input, None
    return output if layer_input is None else output + mome(layer_input)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Finds the normalised input of an attention block."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
