"""What a constant prompt promises: the same answers, and a system text that is read once for all batches."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny_models import ADAPTERS, CLIP, LLMS, OTHER, QUESTIONS, answers, build

from mllm.inference.answerer import Answerer, Decoding
from mllm.kv_cache.system_prompt import SystemPrompt

SYSTEM = "place blue at f two now and transcribe speech to text, please."
BATCHES = [
    [([SYSTEM, *CLIP, QUESTIONS[0]], "now"), ([SYSTEM, *OTHER, QUESTIONS[1]], "now")],
    [([SYSTEM, *CLIP, QUESTIONS[2]], "now")],
    [
        ([SYSTEM, *OTHER, QUESTIONS[3]], "now"),
        ([SYSTEM, *OTHER, QUESTIONS[0] + QUESTIONS[1]], "now"),
        ([SYSTEM, *CLIP, QUESTIONS[1]], "now"),
    ],
]
SPEECH_BUDGET = "audio=/4,video=/2"


def make(adapter: str, llm: str = "llama", num_beams: int = 1) -> Answerer:
    config = replace(tiny.settings(("audio", "video"), adapter=False), adapter=ADAPTERS[adapter])
    return Answerer(build(config, LLMS[llm]), tiny.processor(config), Decoding(num_beams, max_new_tokens=5))


@pytest.mark.parametrize(
    ("llm", "adapter", "num_beams"),
    [("llama", "none", 1), ("a sliding window shorter than the prompts", "lora", 1), ("llama", "a bank by task", 3)],
)
def test_answers_are_the_same_and_the_text_is_read_once(llm: str, adapter: str, num_beams: int) -> None:
    plain = make(adapter, llm, num_beams)
    keeping = replace(plain, constant_prompt=True)
    alone = 1
    for number, batch in enumerate(BATCHES):
        (expected, positions), (texts, fewer) = read(plain, batch), read(keeping, batch)
        assert texts == expected
        if number == alone:
            (kept,) = keeping._constant._kept.values()
            assert len(kept.ids) >= len(SYSTEM.split())
            assert positions - fewer == len(kept.ids)  # which no batch but the first has read


def read(answerer: Answerer, rows: list[Any]) -> tuple[list[Any], int]:
    """Answers, and how many positions the LLM has read."""
    seen: list[int] = []
    hook = answerer.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    answered = answers(answerer, rows, [SPEECH_BUDGET])
    hook.remove()
    return answered, sum(seen)


def inputs(rows: list[list[int]], **expert_ids: list[int]) -> dict[str, torch.Tensor]:
    size = max(map(len, rows))
    padded = [[0] * (size - len(row)) + row for row in rows]
    masks = [[0] * (size - len(row)) + [1] * len(row) for row in rows]
    named = {key: torch.tensor(ids) for key, ids in expert_ids.items()}
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks), **named}


def test_the_constant_text_is_what_batches_have_in_common() -> None:
    model, keeper = torch.nn.Linear(1, 1), SystemPrompt()
    base = list(range(1, 13))

    def prefix_of(rows: list[list[int]], **expert_ids: Any) -> tuple[int, ...] | None:
        text = keeper.of_batch(model, inputs(rows, **expert_ids), {99})
        return None if text is None else text.ids

    assert prefix_of([[*base, 50, 99, 60], [*base, 51, 99]]) == tuple(base)
    assert prefix_of([[*base, 50, 99]]) == tuple(base)
    assert prefix_of([[*base[:10], 52, 99]]) == tuple(base[:10])  # from now on it is shorter
    assert prefix_of([[*base, 99]]) == tuple(base[:10])
    assert prefix_of([[7, 8, 99]]) is None
    assert prefix_of([[*base, 99], [*base, 99]], task_ids=[0, 1]) is None
    assert prefix_of([[*base, 99], [*base, 99]], task_ids=[1, 1]) == tuple(base)
    with torch.no_grad():
        model.weight.add_(1)
    assert prefix_of([[*base, 50, 99]]) == (*base, 50)  # all was forgotten


def test_a_static_cache_takes_over_nothing() -> None:
    with pytest.raises(ValueError, match="constant_prompt is true with static_cache"):
        replace(make("none"), decoding=Decoding(static_cache=True), constant_prompt=True)
