"""Lets a host answer samples that have no answer: at its full budget, where no adapter is used, greedily.

Knows a model on a host, its processor and rows. Does not know losses, sampled budgets or the optimizer.

What the host says becomes the targets of its rows, as it chose it, token by token. What these tokens should be at a
reduced budget is then learned from the same host (see `mllm.training.step`), so no second model is in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mllm.budget import Budget
from mllm.hosts.channels import PrefixTypes
from mllm.inference.decoding import Decoding, end_ids_of, generate_options, up_to_end
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.processing.batch import Batch
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.processor import ElasticProcessor


@torch.no_grad()
def answered_by_host(
    batch: Batch,
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    *,
    features: Mapping[str, Features],
    max_new_tokens: int,
) -> Batch:
    """Return a batch whose every row has targets; rows that have some stay as they are.

    Args:
        batch: for training; rows without an answer end with what an answer begins behind.
        model: not wrapped, and whole on this process.
        features: of the media of the batch, which are encoded already.
        max_new_tokens: answers end there at the latest.
    """
    numbers = [number for number, row in enumerate(batch.rows) if set(row.labels) == {IGNORED_LABEL}]
    if not numbers:
        return batch
    unanswered = Batch([batch.rows[number] for number in numbers])
    expanded = processor.expand(unanswered, [[Budget()] * len(numbers)], left_padding=True)
    inputs = {key: value.to(model.device) for key, value in expanded.inputs.items()}
    options = generate_options(model, processor, Decoding(max_new_tokens=max_new_tokens))
    model.eval()
    ids = model.generate(**inputs, features=features, **options)
    ends = end_ids_of(model, processor)
    rows = list(batch.rows)
    for number, new in zip(numbers, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        row, answer = rows[number], _first_line(up_to_end(new, ends), ends, processor)
        rows[number] = replace(row, ids=[*row.ids, *answer], labels=[*row.labels, *answer])
    return replace(batch, rows=rows)


def _first_line(answer: list[int], ends: Sequence[int], processor: ElasticProcessor) -> list[int]:
    """Keep what a host says before a line break, where that is what ends a question to its decoder; then it ends."""
    channels = None if processor.host is None else processor.host.family.channels
    if not isinstance(channels, PrefixTypes) or channels.break_id not in answer:
        return answer
    return [*answer[: answer.index(channels.break_id)], ends[0]]
