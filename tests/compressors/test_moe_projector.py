"""A mixture of projectors is the plain loop over tokens and experts; its losses are what the definitions say."""

import pytest
import torch
from blocks import medium, merged

from mllm.compressors import build_compressor
from mllm.compressors.moe_projector import MixtureProjector, routing_losses
from mllm.compressors.projector import Projector

SMOP = {
    "compressor": "pool",
    "projector": {"kind": "moe", "num_experts": 4, "norm": True, "activation": "relu"},
    "budgets": ["/2", "/4"],
}


def mixture(*, top_k: int = 2) -> MixtureProjector:
    torch.manual_seed(0)
    experts = [Projector(in_size=6, out_size=8, hidden_size=5, norm=True, activation="relu") for _ in range(4)]
    return MixtureProjector(experts, in_size=6, top_k=top_k)


def test_each_token_goes_through_its_own_best_experts() -> None:
    mixed = mixture()
    features = torch.randn(2, 3, 6)
    out = mixed(features)
    for item in range(2):
        for position in range(3):
            token = features[item, position]
            scores = torch.softmax(mixed.gate.weight @ token, dim=0)
            best = sorted(range(4), key=lambda expert: -scores[expert].item())[:2]
            total = sum(scores[expert] for expert in best)
            expected = sum(scores[expert] / total * mixed.experts[expert](token) for expert in best)
            torch.testing.assert_close(out[item, position], expected)


def test_all_experts_used_is_the_softmax_mixture_and_one_expert_is_a_projector() -> None:
    features = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    mixed = mixture(top_k=1)
    best = mixed.gate(features).argmax(dim=-1)[0]
    expected = torch.stack([mixed.experts[int(expert)](features[0, position]) for position, expert in enumerate(best)])
    torch.testing.assert_close(mixed(features)[0], expected)


def test_the_losses_are_of_the_tokens_of_a_row_alone() -> None:
    mixed = mixture().train()
    mixed(torch.randn(2, 5, 6))
    routing = mixed.take_routing()
    assert routing is not None
    assert mixed.take_routing() is None
    is_token = torch.tensor([[True, True, False, True, False], [False] * 5])
    balance, squares = routing_losses(routing, is_token, top_k=2)
    tokens = routing[0, is_token[0]]
    probabilities, chosen, logarithms = tokens[:, :4], tokens[:, 4:8], tokens[:, 8]
    expected = 4 * sum((chosen[:, expert].sum() / (2 * 3)) * probabilities[:, expert].mean() for expert in range(4))
    torch.testing.assert_close(balance, torch.stack([expected, torch.zeros(())]))
    torch.testing.assert_close(squares, torch.stack([(logarithms**2).mean(), torch.zeros(())]))
    mixed.eval()(torch.randn(1, 2, 6))
    assert mixed.take_routing() is None


def test_an_even_use_of_the_experts_is_one() -> None:
    chosen = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    routing = torch.cat([torch.full((2, 4), 0.25), chosen, torch.zeros(2, 1)], dim=-1)[None]
    balance, squares = routing_losses(routing, torch.ones(1, 2, dtype=torch.bool), top_k=2)
    assert balance.item() == pytest.approx(1.0)
    assert squares.item() == 0.0


@pytest.mark.parametrize("per_budget", [False, True])
def test_a_mixture_per_budget_reports_the_routing_of_the_asked_one(per_budget: bool) -> None:
    torch.manual_seed(0)
    compressor = build_compressor(
        "audio", medium("audio", merged(SMOP, {"projector": {"per_budget": per_budget}})), in_size=6, out_size=8
    ).train()
    features, lengths = torch.randn(2, 8, 6), torch.tensor([8, 8])
    choice = {"tokens": torch.tensor([4, 2]), "rates": torch.tensor([2, 4])}
    compressor(features, lengths, **choice, max_tokens=4)
    routing = compressor.projectors.take_routing()
    for item, (tokens, rate) in enumerate(((4, 2), (2, 4))):
        alone = {"tokens": torch.tensor([tokens]), "rates": torch.tensor([rate])}
        compressor(features[item : item + 1], lengths[:1], **alone, max_tokens=tokens)
        mixed = compressor.projectors.take_routing()
        torch.testing.assert_close(routing[item, :tokens], mixed[0, :tokens])
        assert (mixed[0, :tokens, 4:8].sum(dim=-1) == 2).all()


def test_settings_that_do_not_fit_are_refused() -> None:
    for changes, message in (
        ({"projector": {"top_k": 5}}, r"model.audio.projector.top_k is 5, of 4 experts \(num_experts\)"),
        (
            {"projector": {"kind": "moe", "num_experts": 0}},
            r"model.audio.projector.num_experts is 0; it must be at least 1",
        ),
        (
            {"projector": {"before_pooling": True}},
            r"model.audio.projector.before_pooling goes with kind mlp or linear, not with moe",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            medium("audio", merged(SMOP, changes))
    with pytest.raises(ValueError, match=r"model\.audio\.projector\.top_k goes with kind moe, not with mlp"):
        medium("audio", {**SMOP, "projector": {"top_k": 2}})
