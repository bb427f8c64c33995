"""Times a mixture of experts beside a layer, forward and backward: a loop over experts, and one dense product.

    python benchmarks/mixture_adapter.py [--repeats 7] [--threads 1] [--tokens 512]

The loop is that of transformers (models/mixtral/modeling_mixtral.py, `MixtralExperts.forward`: experts that are hit,
`torch.where` on the mask of choices, gathered tokens, `index_add_`), with the experts of MoME (arXiv 2510.04136): a
linear layer, GELU, a linear layer, with biases, and gates that are not renormalised. MoME's own code is not released.
The router is in float32 in both, as in models/deepseek_v3/modeling_deepseek_v3.py. Both use the same 16 experts of
width 16, of which a token chooses 4, beside a layer 1024 wide. Outputs and gradients must agree to 1e-5 in float32 and
1e-2 in bfloat16 before anything is timed. On a CPU without arithmetic for bfloat16 the dense product is computed in
float32.
"""

from functools import partial

import torch
from outcomes import append, timed
from side_by_side import alternate, report
from torch import Tensor
from torch.nn import functional
from turns import options

from mllm.adapters.mome import Mome

HIDDEN_SIZE, NUM_EXPERTS, TOP_K, BOTTLENECK = 1024, 16, 4, 16
BFLOAT16_GOAL = 2.5


def build(dtype: torch.dtype, num_tokens: int) -> tuple[Mome, Tensor, Tensor]:
    """Build the adapter, what goes in, and the gradient that comes back."""
    torch.manual_seed(0)
    mome = Mome(HIDDEN_SIZE, num_experts=NUM_EXPERTS, num_shared=0, top_k=TOP_K, bottleneck=BOTTLENECK)
    for weight in (mome.up, mome.up_bias, mome.down_bias):  # zero at first
        weight.data.normal_(std=0.1)
    hidden = torch.randn(1, num_tokens, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
    return mome.to(dtype), hidden, torch.randn(1, num_tokens, HIDDEN_SIZE, dtype=dtype)


def loop(mome: Mome, hidden: Tensor) -> Tensor:
    """Run one expert after the other, each on the tokens that chose it."""
    states = hidden[0]
    probabilities = functional.linear(states.float(), mome.router[0].float()).softmax(dim=-1)
    weights, index = probabilities.topk(TOP_K, dim=-1)
    out = torch.zeros_like(states)
    with torch.no_grad():
        mask = functional.one_hot(index, num_classes=NUM_EXPERTS).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for (expert,) in hit:
        choice, token = torch.where(mask[expert])
        inner = functional.gelu(functional.linear(states[token], mome.down[expert], mome.down_bias[expert]))
        weighted = functional.linear(inner, mome.up[expert], mome.up_bias[expert]) * weights[token, choice, None]
        out = out.index_add(0, token, weighted.to(out.dtype))
    return out[None]


def step(way: str, mome: Mome, hidden: Tensor, upstream: Tensor) -> float:
    """Go forward and backward once; return a number to compare."""
    out = loop(mome, hidden) if way == "expert loop" else mome(hidden)
    hidden.grad = None
    out.backward(upstream)
    return float(out.detach().float().square().mean())


def check(dtype: torch.dtype, num_tokens: int, rel: float) -> float:
    """Measure the largest relative difference of outputs and gradients.

    Raises:
        SystemExit: it is more than `rel`.
    """
    mome, hidden, upstream = build(dtype, num_tokens)
    results = []
    for way in (loop, Mome.__call__):
        mome.zero_grad()
        hidden.grad = None
        out = way(mome, hidden)
        out.backward(upstream)
        results.append(
            [out.detach(), *(one.grad.clone() for one in (hidden, *mome.parameters()) if one.grad is not None)]
        )
    worst = max(
        float((ours - theirs).float().norm() / theirs.float().norm()) for theirs, ours in zip(*results, strict=True)
    )
    if worst > rel:
        raise SystemExit(f"FAILED: in {dtype} the two differ by {worst:.1e}")
    return worst


def main() -> None:
    """Check, measure and print."""
    arguments = options(__doc__, 7, tokens=512)
    flops = {"expert loop": float(TOP_K), "dense": float(NUM_EXPERTS)}
    outcomes = []
    for dtype, rel, goal in ((torch.float32, 1e-5, None), (torch.bfloat16, 1e-2, BFLOAT16_GOAL)):
        worst = check(dtype, arguments.tokens, rel)
        parts = build(dtype, arguments.tokens)
        runs = {way: partial(step, way, *parts) for way in flops}
        seconds = alternate(parts[0], runs, arguments.repeats)
        goals = {} if goal is None else {"dense": goal}
        report(f"{dtype}, {arguments.tokens} tokens; equal within {worst:.1e}", seconds, flops, goals)
        outcomes.append(
            timed(
                f"mixture of experts, forward and backward, {str(dtype).removeprefix('torch.')}",
                "loop over experts, as transformers'",
                seconds["expert loop"],
                seconds["dense"],
                check=f"output and gradients within {worst:.0e}",
                predicted=flops["expert loop"] / flops["dense"],
                goal=goal,
            )
        )
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
