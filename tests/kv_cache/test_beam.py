"""What beams promise: the library's own answers from a prompt that is read once per row, whatever stands beside it."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny_models import ADAPTERS, LLMS, ROWS, build
from transformers import DynamicCache, GenerationConfig, GenerationMixin

from mllm.budget import Budget
from mllm.kv_cache.beam import GROWTH_TOKENS, BeamLayer, spread
from mllm.model.media_arguments import MEDIA_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration

SPEECH = [
    ([tiny.random_media("audio", 37), tiny.random_media("video", 19), "transcribe speech and video to text."], "now"),
    ([tiny.random_media("audio", 24, seed=3), "transcribe speech to text."], "place"),
    ([tiny.random_media("video", 21, seed=4), "transcribe video to text."], "blue"),
    ([tiny.random_media("audio", 48, seed=5), tiny.random_media("video", 24, seed=5), "what was said?"], "red"),
    (["how many objects?"], "two"),
]
SPEECH_BUDGETS = [Budget.parse(text) for text in ("audio=/4,video=/2", "audio=/8", "video=/5", "audio=/8,video=/5", "")]
MIXED_BUDGETS = [Budget.parse(text) for text in ("image=16", "audio=/4,video=/5", "", "image=5,audio=/8")]


def library_ids(model: ElasticForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """What transformers alone generates from the same embeddings, every beam reading the prompt."""
    media = {key: inputs.get(key) for key in MEDIA_KEYS}
    rest = {key: value for key, value in inputs.items() if key not in MEDIA_KEYS and key != "input_ids"}
    embeds = model.model.embed(inputs["input_ids"], media)
    return GenerationMixin.generate(
        model, inputs["input_ids"].clamp(max=len(tiny.TOKENIZER) - 1), inputs_embeds=embeds, **rest, **options
    )  # pyright: ignore


def answers(model, processor, rows, budgets, generate=None, **options: Any) -> list[list[int]]:
    inputs = processor.expand(tiny.batch(processor, rows), [budgets], left_padding=True).inputs
    options = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, **options}
    options = {key: value for key, value in options.items() if value is not None}
    generated = model.generate(**inputs, **options) if generate is None else generate(model, inputs, **options)
    end, pad = processor.tokenizer.eos_token_id, processor.pad_id
    return [_cut(row, end, pad) for row in generated[:, inputs["input_ids"].shape[1] :].tolist()]


def _cut(ids: list[int], *ends: int) -> list[int]:
    return ids[: min([ids.index(end) for end in ends if end in ids], default=len(ids))]


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_answers_are_the_librarys_in_a_batch_and_alone(llm: str, adapter: str) -> None:
    config = replace(tiny.settings(("audio", "video"), adapter=False), adapter=ADAPTERS[adapter])
    model, processor = build(config, LLMS[llm]), tiny.processor(config)
    together = answers(model, processor, SPEECH, SPEECH_BUDGETS)
    assert together == answers(model, processor, SPEECH, SPEECH_BUDGETS, library_ids)
    assert len({tuple(ids) for ids in together}) > 2  # the rows really are different requests
    for row, budget, ids in zip(SPEECH, SPEECH_BUDGETS, together, strict=True):
        assert answers(model, processor, [row], [budget]) == [ids]


@pytest.fixture(scope="module")
def made():
    config = tiny.settings()
    return tiny.model(config, seed=3), tiny.processor(config)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 15},
        {"num_beams": 3, "max_new_tokens": 1},
        {"num_beams": 3, "max_new_tokens": GROWTH_TOKENS + 9},
        {"num_beams": 3, "length_penalty": -2.0},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 1, "num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"num_beams": None, "generation_config": GenerationConfig(num_beams=3, max_new_tokens=12)},
        {"num_beams": 3, "output_attentions": True},
        {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@torch.no_grad()
def test_options_mean_what_they_mean_in_the_library(made, options: dict[str, Any]) -> None:
    model, processor = made
    ids = answers(model, processor, ROWS, MIXED_BUDGETS, **options)
    assert ids == answers(model, processor, ROWS, MIXED_BUDGETS, library_ids, **options)


@torch.no_grad()
def test_answers_that_end_early_do_so_in_a_batch(made) -> None:
    model, processor = made
    free = answers(model, processor, ROWS, MIXED_BUDGETS)
    ends = [free[0][2], free[1][5], tiny.TOKENIZER.eos_token_id]
    ended = {"eos_token_id": ends, "pad_token_id": processor.pad_id, "length_penalty": 0.0}
    ids = answers(model, processor, ROWS, MIXED_BUDGETS, **ended)
    assert ids == answers(model, processor, ROWS, MIXED_BUDGETS, library_ids, **ended)
    # A row that waits for its batch mates is filled up behind its end, with an end where the pad id is 0.
    ended_at = [_cut(row, *ends) for row in ids]
    assert len({len(row) for row in ended_at}) > 1
    rows = [([row], [budget]) for row, budget in zip(ROWS, MIXED_BUDGETS, strict=True)]
    assert ended_at == [_cut(answers(model, processor, *row, **ended)[0], *ends) for row in rows]


@torch.no_grad()
def test_the_prompt_is_read_by_as_many_rows_as_there_are_prompts(made) -> None:
    model, processor = made
    seen = []
    handle = model.get_decoder().register_forward_hook(
        lambda _, __, kwargs, out: seen.append(tuple(out.last_hidden_state.shape[:2])), with_kwargs=True
    )
    try:
        inputs = processor.expand(tiny.batch(processor, ROWS), [MIXED_BUDGETS], left_padding=True).inputs
        model.generate(**inputs, num_beams=5, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert seen == [(len(ROWS), length - 1), *[(5 * len(ROWS), 1)] * 4]
    finally:
        handle.remove()


@torch.no_grad()
def test_a_prompt_that_ends_in_soft_tokens_is_read_to_its_end(made) -> None:
    model, processor = made
    inputs = processor.expand(
        tiny.batch(processor, [(["what is", tiny.random_media("image")], "red")]),
        [MIXED_BUDGETS[:1]],
        left_padding=True,
    ).inputs
    soft = (inputs["input_ids"][0] == model.config.placeholder_ids["image"]).nonzero().max() + 1
    inputs = {key: value[:, :soft] if value.dim() == 2 else value for key, value in inputs.items()}
    options = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False}
    ids = model.generate(**inputs, **options)[:, soft:]
    assert ids.tolist() == library_ids(model, inputs, **options)[:, soft:].tolist()


def test_a_layer_holds_what_a_growing_one_holds() -> None:
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.randn(2, rows, 2, length, 4, generator=generator)
        return made[0], made[1]

    first = states(3, 7)
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        cache.update(*first, 0)
    caches[0].batch_repeat_interleave(4)
    spread(caches[1], 4)
    assert isinstance(caches[1].layers[0], BeamLayer)
    for step in range(GROWTH_TOKENS + 5):
        new = states(12, 1)
        expected, spread_out = [cache.update(*new, 0) for cache in caches]
        assert all(torch.equal(one, other) for one, other in zip(expected, spread_out, strict=True))
        assert caches[1].get_seq_length() == 8 + step
        # Copies of a row change places among themselves and with nobody else.
        order = (torch.randint(4, (3, 4), generator=generator) + 4 * torch.arange(3)[:, None]).flatten()
        for cache in caches:
            cache.reorder_cache(order)
