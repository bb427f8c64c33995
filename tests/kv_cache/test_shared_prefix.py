"""What shared beginnings promise: the ids of rows that are read alone, whatever model, adapter and company."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny_models import ADAPTERS, CLIP, LLMS, OTHER, QUESTIONS, answers, build
from transformers import GenerationConfig

from mllm.budget import Budget
from mllm.inference.answerer import Answerer, Decoding
from mllm.kv_cache.shared_prefix import Prefixes, group_rows

ROWS = [
    ([*CLIP, QUESTIONS[0]], "now"),
    ([*OTHER, QUESTIONS[1]], "now"),
    ([*CLIP, QUESTIONS[2]], "now"),
    ([QUESTIONS[3]], "two"),
    ([*CLIP, QUESTIONS[1]], "place"),
    ([*OTHER, QUESTIONS[3] + " " + QUESTIONS[0]], "place"),
    ([CLIP[0], QUESTIONS[0]], "place"),
    ([QUESTIONS[3], *CLIP], "place"),  # ends with soft tokens
    ([QUESTIONS[3], *CLIP], "place"),
]


GREEDY = [(llm, adapter, 1) for llm in LLMS for adapter in ADAPTERS]
BEAMS = [("llama", adapter, 3) for adapter in ADAPTERS] + [(llm, "none", 3) for llm in LLMS if llm != "llama"]


@pytest.mark.parametrize(("llm", "adapter", "num_beams"), [*GREEDY, *BEAMS])
def test_answers_are_those_of_each_question_alone(llm: str, adapter: str, num_beams: int) -> None:
    config = replace(tiny.settings(("audio", "video"), adapter=False), adapter=ADAPTERS[adapter])
    answerer = Answerer(build(config, LLMS[llm]), tiny.processor(config), Decoding(num_beams, max_new_tokens=6))
    budgets = ["audio=/4,video=/2", "audio=/8,video=/5"]
    by_budget = answers(answerer, ROWS, budgets)
    for number, row in enumerate(ROWS):
        answer, budget = by_budget[number % 2][number], budgets[number % 2]
        alone = answers(answerer, [row], [budget])[0][0]
        assert answer == replace(alone, num_shared_tokens=answer.num_shared_tokens)
    alike = [True, True, True, False, True, True, False, True, True]
    assert [[answer.num_shared_tokens > 0 for answer in answered] for answered in by_budget] == [alike, alike]
    assert len({answer.text for answer in by_budget[0]}) > 2


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    config = tiny.settings()
    return Answerer(tiny.model(config, seed=3), tiny.processor(config), Decoding(max_new_tokens=12))


def count_forwards(answerer: Answerer, rows: list[Any], budget: str) -> dict[str, Any]:
    """Images that are encoded, and rows and positions of the LLM's passes."""
    seen: dict[str, Any] = {"images": 0, "passes": []}
    model = answerer.model
    hooks = [
        model.model.encoder("image").register_forward_pre_hook(
            lambda _, args: seen.update(images=seen["images"] + len(args[0]))
        ),
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: seen["passes"].append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        ),
    ]
    answers(answerer, rows, [budget])
    for hook in hooks:
        hook.remove()
    return seen


def test_the_image_is_encoded_once_and_its_tokens_are_read_once(answerer: Answerer) -> None:
    image = tiny.random_media("image")
    rows = [([image, question], "a") for question in QUESTIONS]
    answered = answers(answerer, rows, ["image=64"])[0]
    unshared = [answer.num_prompt_tokens - answer.num_shared_tokens for answer in answered]
    seen = count_forwards(answerer, rows, "image=64")
    assert seen["images"] == 1
    assert answered[0].num_shared_tokens >= 64
    longest = max(answer.num_prompt_tokens for answer in answered)
    assert seen["passes"][:2] == [(1, longest - max(unshared)), (4, max(unshared))]


def test_equal_files_that_are_read_twice_are_two_images(answerer: Answerer) -> None:
    rows = [([tiny.random_media("image"), question], "a") for question in QUESTIONS]
    assert count_forwards(answerer, rows, "image=16")["images"] == 4
    assert {answer.num_shared_tokens for answer in answers(answerer, rows, ["image=16"])[0]} == {0}


def test_beginnings_of_a_few_tokens_are_read_again_in_one_pass(answerer: Answerer) -> None:
    image = tiny.random_media("image")
    rows = [([image, question], "a") for question in QUESTIONS]
    seen = count_forwards(answerer, rows, "image=1")
    assert seen["images"] == 1
    assert seen["passes"][0][0] == len(rows)
    alone = [answers(answerer, [row], ["image=1"])[0][0] for row in rows]
    assert answers(answerer, rows, ["image=1"])[0] == alone


def test_the_same_question_twice_and_questions_that_begin_alike(answerer: Answerer) -> None:
    image = tiny.random_media("image")
    rows = [([image, text], "a") for text in ("what is it?", "what is it?", "what is the letter?")]
    answered = answers(answerer, rows, ["image=16"])[0]
    assert answered[0].text == answered[1].text
    assert [answer.text for answer in answered] == [answers(answerer, [row], ["image=16"])[0][0].text for row in rows]


def test_a_question_far_longer_than_the_others_changes_nothing(answerer: Answerer) -> None:
    """The others then read some soft tokens again, and their window even begins before their prompt."""
    image, far = tiny.random_media("image"), tiny.random_media("image", seed=4)
    long = " ".join(QUESTIONS * 3)
    rows = [([image, "now"], "a"), ([image, long], "a"), ([far, "now"], "a"), ([far, "red"], "a"), (["hi"], "a")]
    for budget in ("image=64", "image=1"):
        together = answers(answerer, rows, [budget])[0]
        alone = [answers(answerer, [row], [budget])[0][0] for row in rows]
        assert [answer.text for answer in together] == [answer.text for answer in alone]


@pytest.mark.parametrize(
    ("rows", "keys", "index", "lengths"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]], ["a", "a", "a"], [0, 0, 0], [2]),
        ([[1, 2, 3], [1, 2, 3]], ["a", "b"], [0, 1], [3, 3]),
        ([[1, 2, 3], [1, 2, 3]], [None, None], [0, 1], [3, 3]),
        ([[5], [1, 2, 3], [5]], ["a", "b", "a"], [0, 1, 0], [1, 3]),
    ],
)
def test_groups_share_all_but_what_differs(rows, keys, index, lengths) -> None:
    assert group_rows(rows, keys) == (index, lengths)


def test_embeddings_of_rows_are_those_of_their_first_row_where_they_begin_alike() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    prefixes = Prefixes(torch.tensor([0, 0, 1]), torch.tensor([2, 1]), mask)
    assert prefixes.first_rows.tolist() == [0, 2]
    assert prefixes.num_unshared == 2
    shown = torch.tensor([[-1, 10, 11, 12], [-1, -1, 20, 21]])[..., None]
    text = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 8, 9]])[..., None]
    answered = prefixes.on_rows(shown, text)[..., 0].tolist()
    assert answered == [[0, 10, 11, 3], [10, 11, 6, 7], [0, 0, 20, 9]]


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"generation_config": GenerationConfig(use_cache=False)},
    ],
    ids=str,
)
def test_options_that_forbid_sharing_are_refused(answerer: Answerer, options: dict[str, Any]) -> None:
    image = tiny.random_media("image")
    batch = tiny.batch(answerer.processor, [([image, question], "a") for question in QUESTIONS])
    budgets = [[Budget.parse("image=16")] * 4]
    inputs = answerer.processor.expand(batch, budgets, left_padding=True, share_prefixes=True).inputs
    assert len(inputs["num_image_tokens"]) == 1
    with pytest.raises(ValueError, match="leave it out to read every prompt by itself"):
        answerer.model.generate(**inputs, **options)
