"""LLaVA-1.5-M3 against what its released code computed: a released file, the command, and what the run folder gives."""

import pytest
import torch
from rebuild import Golden
from released_llava import (
    Released,
    check_encoder_and_connector,
    check_every_result_is_compared,
    check_greedy_ids,
    check_logits_and_losses,
    convert_golden,
)

from mllm.budget.sampler import BudgetSampler
from mllm.training.loss import loss_of_logits
from mllm.training.step import make_training_batch, num_targets, sampled_views

GOLDEN = Golden.read("m3")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return convert_golden(GOLDEN, "llava-m3", tmp_path_factory.mktemp("m3"), {})


def test_golden_encoder_and_tokens(released: Released) -> None:
    check_encoder_and_connector(released)


def test_golden_logits_and_losses(released: Released) -> None:
    check_logits_and_losses(released)


def test_golden_greedy_ids(released: Released) -> None:
    check_greedy_ids(released)


def test_golden_training_loss(released: Released) -> None:
    """One forward pass over every scale gives the mean of the released code's passes, and it can be learned from."""
    batch, sampler = released.rows(), BudgetSampler(released.processor.space, mode="all")
    passes = sampled_views(batch.rows, sampler, step=0)
    assert len(passes) == len(batch.rows) * len(released.counts)
    training_batch = make_training_batch(batch, passes, released.processor)
    logits = released.model(**training_batch.inputs, logit_positions=training_batch.positions).logits
    loss = loss_of_logits(logits, training_batch.targets, num_targets(batch.rows))
    assert float(loss.total.detach()) == pytest.approx(GOLDEN.facts["results"]["train_loss"], rel=1e-4, abs=1e-4)
    loss.total.backward()
    weight = released.model.model.compressors["image"].projectors[0][0].weight
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad)


def test_every_result_is_compared(released: Released) -> None:
    check_every_result_is_compared(released, {"train_loss"})
