"""Every soft token lies at its placeholder, and counts that do not fit are refused."""

import pytest
import torch

from mllm.model.splice import check_placeholders, merge
from mllm.processing.placeholders import pad_rows

AUDIO = 90


def test_merge_puts_run_i_token_j_at_its_place_and_leaves_the_text() -> None:
    rows = [[7, AUDIO, AUDIO, 8, AUDIO], [AUDIO, AUDIO, AUDIO, 9], [5, 6]]
    input_ids = pad_rows(rows, 0, left=True)
    text = torch.randn(*input_ids.shape, 3)
    counts = torch.tensor([2, 1, 3])
    soft = torch.full((3, 4, 3), float("nan"))
    for run, count in enumerate(counts.tolist()):
        soft[run, :count] = torch.randn(count, 3)
    merged = merge(text, input_ids == AUDIO, soft, counts)

    expected, queue = text.clone(), [soft[run, j] for run, count in enumerate(counts.tolist()) for j in range(count)]
    for row, column in (input_ids == AUDIO).nonzero().tolist():
        expected[row, column] = queue.pop(0)
    assert not queue
    assert torch.equal(merged, expected)


def test_merge_gives_gradient_to_the_tokens_used_and_to_the_text_beside_them() -> None:
    is_placeholder = torch.tensor([[False, True, True]])
    text, soft = torch.zeros(1, 3, 2, requires_grad=True), torch.zeros(1, 4, 2, requires_grad=True)
    merge(text, is_placeholder, soft, torch.tensor([2])).sum().backward()
    assert text.grad is not None
    assert soft.grad is not None
    assert text.grad[0, :, 0].tolist() == [1, 0, 0]
    assert soft.grad[0, :, 0].tolist() == [1, 1, 0, 0]


def test_a_batch_that_does_not_fit_names_both_counts() -> None:
    with pytest.raises(ValueError, match="2 audio placeholders in the text for 3 audio soft tokens in samples a, b"):
        check_placeholders(torch.tensor([[AUDIO, 1], [AUDIO, 2]]), AUDIO, torch.tensor([3]), "audio", ["a", "b"])
