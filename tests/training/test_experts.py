"""What is written of the experts that tokens chose: every choice once, by budget, on any number of micro-batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from harness import make_trainer, run_settings
from PIL import Image
from row_adapters import ALL, model_settings

from mllm.adapters.adapter_inputs import TOKEN_KINDS
from mllm.training.experts import COUNTS, ExpertUsage, plot_experts, read_counts


def test_counts_are_summed_by_budget_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    usage = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    accelerator = Accelerator(cpu=True)
    counter = ExpertUsage()
    for step in (1, 2, 2):  # a resumed run comes by step 2 again
        counter.add(["a", "b"], torch.tensor([1, 0, 1]), usage)
        counter.add(["b"], torch.tensor([0, 0, 0]), usage)
        counter.report(accelerator, step, tmp_path)
    counts = read_counts(tmp_path / COUNTS)
    np.testing.assert_array_equal(counts["a"], 2 * usage[:, 1].numpy())
    np.testing.assert_array_equal(counts["b"], 2 * (usage[:, 0] + usage[:, 2] + usage.sum(1)).numpy())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_token_of_a_run_chooses_top_k_experts_in_every_layer(tmp_path: Path, accumulation: int) -> None:
    settings = run_settings(
        tmp_path, model_settings("mome"), sampler=ALL, max_steps=2, log_every=1, accumulation=accumulation
    )
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]] if accumulation == 1 else [[0, 1], [2, 3], [4, 5], [6, 7]]
    trainer = make_trainer(settings, batches=batches)
    trainer.train()
    counts = read_counts(tmp_path / COUNTS)
    assert any(name.startswith("audio=") for name in counts)
    for one in counts.values():
        layers = one.sum(axis=(1, 2))
        assert (layers == layers[0]).all(), "every layer sees every token"
        assert layers[0] % 2 == 0, "two experts per token"
    video_only = counts[next(name for name in counts if name.startswith("video="))]
    assert video_only[:, TOKEN_KINDS.index("audio")].sum() == 0
    assert video_only[:, TOKEN_KINDS.index("video")].sum() > 0


def test_the_heat_map_has_a_panel_per_kind_and_budget(tmp_path: Path) -> None:
    counts = {"audio=/4": np.ones((2, 4, 5), int), "video=/2": np.ones((2, 4, 5), int)}
    plot_experts(counts, tmp_path / "experts.png")
    image = np.asarray(Image.open(tmp_path / "experts.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
