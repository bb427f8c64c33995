"""MQT-LLaVA against what its released code computed: a released file, the command, and what the run folder gives."""

import numpy as np
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
from torch import Tensor

GOLDEN = Golden.read("mqt")
POSITIONS = "model.query_abstractor.pos_embed"


def position_table(rows: int, size: int) -> Tensor:
    """The fixed sine-cosine table of a square of queries, in half precision: half of the size per axis."""
    side = round(rows**0.5)
    down, across = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    frequency = 1.0 / 10000 ** (np.arange(size // 4) / (size / 4))
    halves = []
    for places in (across, down):
        angle = np.outer(places.reshape(-1), frequency)
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1).astype(np.float32)).half()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    table = position_table(*GOLDEN.facts["layout"][POSITIONS])
    return convert_golden(GOLDEN, "mqt-llava", tmp_path_factory.mktemp("mqt"), {POSITIONS: table})


def test_golden_encoder_and_tokens(released: Released) -> None:
    check_encoder_and_connector(released)


def test_golden_logits_and_losses(released: Released) -> None:
    check_logits_and_losses(released)


def test_golden_greedy_ids(released: Released) -> None:
    check_greedy_ids(released)


def test_every_result_is_compared(released: Released) -> None:
    check_every_result_is_compared(released, set())
