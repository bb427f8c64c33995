"""Liger's kernel gives the loss, the sums and the gradients that logits give; where it cannot, it is refused.

Without a GPU the kernel runs in Triton's interpreter: `make test-liger` installs it and runs these.
"""

import dataclasses
import os
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import tiny
import torch
from harness import EVERYTHING, log_rows, make_trainer, run_settings
from torch import nn

from mllm.config.model import ModelConfig
from mllm.config.run import SamplerConfig
from mllm.training import fused_loss
from mllm.training.arguments import build_arguments
from mllm.training.fused_loss import VERSIONS, FusedTargetLoss, check_liger, plain_head
from mllm.training.loss import ChunkedTargetLoss, Distillation, WeightedTargets

SMALL = tiny.settings(("audio",))


@pytest.fixture
def device() -> torch.device:
    """Where the kernel can run."""
    for package in ("triton", "liger_kernel"):
        if os.environ.get("REQUIRE_LIGER") != "1":
            pytest.importorskip(package)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU the kernel runs in Triton's interpreter only: see `make test-liger`")
    return torch.device("cpu")


def targets_of(num_targets: int, vocabulary: int, device: torch.device) -> WeightedTargets:
    """Targets of three budgets, each of a weight of its own, some of them 0."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(num_targets, generator=rng)
    weights[::5] = 0
    return WeightedTargets(
        ids=torch.randint(vocabulary, (num_targets,), generator=rng),
        weights=weights,
        budgets=torch.randint(3, (num_targets,), generator=rng),
        teachers=torch.arange(num_targets),
        num_budgets=3,
    ).to(device)


# The kernel takes 4 of 10, 8 of 37 and all targets at once; the last vocabulary is more than one of its blocks.
@pytest.mark.parametrize(("num_targets", "size", "vocabulary"), [(10, 3, 7), (37, 16, 100), (5, 64, 50), (4, 8, 40000)])
@pytest.mark.parametrize("head_trains", [True, False])
def test_loss_sums_and_gradients_are_those_of_logits(
    device: torch.device, num_targets: int, size: int, vocabulary: int, head_trains: bool
) -> None:
    rng = torch.Generator().manual_seed(1)
    linear = nn.Linear(size, vocabulary, bias=False, device=device).requires_grad_(head_trains)
    linear.weight.data.copy_(torch.randn(vocabulary, size, generator=rng) / size**0.5)
    hidden = torch.randn(num_targets, size, generator=rng).to(device).requires_grad_()
    targets, in_step = targets_of(num_targets, vocabulary, device), torch.tensor(7)
    inputs = [hidden, linear.weight] if head_trains else [hidden]
    expected = ChunkedTargetLoss(targets, in_step, vocabulary_size=vocabulary)(linear, hidden)
    fused_loss = FusedTargetLoss(targets, in_step, linear)
    fused = fused_loss(linear, hidden)
    assert not fused[1].requires_grad
    for result, value in zip(fused, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)
    # scaled as accumulation and processes scale a loss
    gradients = [torch.autograd.grad(3 * loss, inputs) for loss, _ in (fused, expected)]
    for result, value in zip(*gradients, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5 * value.abs().max().item())
    with torch.no_grad():
        _, validated = fused_loss(linear, hidden)
    torch.testing.assert_close(validated, expected[1])


@pytest.mark.parametrize("options", [{}, {"memory": "low"}, {"packing": False, "parts": ["compressors", "llm"]}])
def test_a_run_is_the_same_run(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    monkeypatch.setattr("mllm.training.arguments.check_liger", lambda on_cpu: None)
    model = tiny.settings() if "parts" not in options else plain_llm()
    weights, rows = {}, {}
    for kernel in ("torch", "liger"):
        settings = run_settings(
            tmp_path / kernel,
            model,
            sampler=SamplerConfig(mode="all"),
            validation=True,
            max_steps=2,
            loss_kernel=kernel,
            **options,
        )
        trainer = make_trainer(settings, kinds=EVERYTHING, rows=5, validated_at=["audio=max,image=max,video=max"])
        trainer.train()
        weights[kernel], rows[kernel] = trainer.trainables(), log_rows(tmp_path / kernel)
    for result, expected in zip(rows["liger"], rows["torch"], strict=True):
        assert result == pytest.approx(expected, rel=2e-4)
    for name, value in weights["torch"].items():
        if not name.endswith("k_proj.bias"):  # its gradient is 0 but for rounding, and Adam makes steps of that
            torch.testing.assert_close(weights["liger"][name], value, rtol=1e-3, atol=1e-4)


def plain_llm() -> ModelConfig:
    """No adapter, so that the LLM itself can learn, head and all."""
    return dataclasses.replace(tiny.settings(), adapter=None)


def test_nothing_to_learn_is_a_loss_of_nothing_and_a_gradient_of_nothing() -> None:
    no_targets, linear = torch.zeros(0, dtype=torch.int64), nn.Linear(3, 7, bias=False)
    targets = WeightedTargets(no_targets, torch.zeros(0), no_targets, no_targets, 1)
    hidden = torch.zeros(0, 3, requires_grad=True)
    loss, budget_losses = FusedTargetLoss(targets, 0, linear)(linear, hidden)
    loss.backward()
    assert loss.item() == 0
    assert budget_losses.tolist() == [0]
    assert linear.weight.grad is not None
    assert not linear.weight.grad.any()


def test_a_run_on_a_cpu_is_refused_before_a_model_is_made(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, SMALL, loss_kernel="liger")
    with pytest.raises(ValueError, match=r"train\.loss_kernel is liger, which needs a CUDA device.*use torch"):
        build_arguments(settings, on_cpu=True)


def test_liger_that_is_missing_old_or_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    def broken() -> None:
        raise ImportError("libcuda.so.1: not found")

    monkeypatch.setattr(fused_loss, "version", missing)
    with pytest.raises(ValueError, match=r"train\.loss_kernel is liger, .* pip install -e '\.\[liger\]'"):
        check_liger(on_cpu=False)
    monkeypatch.setattr(fused_loss, "version", lambda _: "0.8.0")
    with pytest.raises(ValueError, match=r"train\.loss_kernel is liger, but liger-kernel 0\.8\.0 is not >=0\.8\.2"):
        check_liger(on_cpu=False)
    monkeypatch.setattr(fused_loss, "version", lambda _: "0.8.5")
    monkeypatch.setattr(fused_loss, "_import_liger", broken)
    with pytest.raises(ValueError, match=r"train\.loss_kernel is liger, .* libcuda\.so\.1: not found"):
        check_liger(on_cpu=False)


def test_the_extra_installs_a_version_that_is_allowed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["liger"] == [f"liger-kernel{VERSIONS}"]


def test_heads_whose_logits_are_no_plain_product_are_refused() -> None:
    model = tiny.model(SMALL)
    assert plain_head(model) is model.lm_head
    size = model.lm_head.weight.shape

    class Adapted(nn.Linear):
        pass

    for head, name in ((Adapted(size[1], size[0], bias=False), "Adapted"), (nn.Linear(size[1], size[0]), "Linear")):
        model.lm_head = head
        with pytest.raises(ValueError, match=rf"train\.loss_kernel is liger, but the head is {name}; it must be"):
            plain_head(model)
    model.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"caps its logits \(final_logit_softcapping 30\.0\)"):
        plain_head(model)


def test_a_head_in_shards_is_refused() -> None:
    model = tiny.model(SMALL)
    model.lm_head.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ZeRO-3 keeps the head in shards; use ZeRO-2, or torch"):
        plain_head(model)
    targets = targets_of(2, 7, torch.device("cpu"))
    with pytest.raises(ValueError, match="ZeRO-3 keeps the head in shards"):
        FusedTargetLoss(targets, 2, model.lm_head)(model.lm_head, torch.zeros(2, 3))


def test_distillation_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(run_settings(tmp_path, SMALL), kinds=[("audio",)], rows=2)
    trainer.fused_head = trainer.elastic.lm_head
    trainer.args.distillation = Distillation(0.5)
    with pytest.raises(ValueError, match=r"train\.loss_kernel liger makes no logits for distillation"):
        trainer.train()
