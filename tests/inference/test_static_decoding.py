"""Decoding with a static cache: the same answers, and a step that a GPU can replay as one graph."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_models import LLMS, build
from torch._dynamo.utils import counters
from transformers import CompileConfig

from mllm.budget import Budget
from mllm.config.model import LoraBankConfig, LoraConfig, MomeConfig
from mllm.inference.answerer import Answerer, Decoding

ADAPTERS = {
    "none": None,
    "lora": LoraConfig(rank=4, targets=["q_proj", "v_proj"]),
    "lora_bank": LoraBankConfig(variant="st", rank=4, alpha=8, tasks=["vqa", "speech"]),
    "mome": MomeConfig(num_experts=4, top_k=2, bottleneck=4),
}
NEW_TOKENS = 6


def whole_graph() -> CompileConfig:
    """As transformers compiles the step on CUDA, but on a CPU, by a backend that only captures it, and whole or not at
    all: what breaks the capture is an error."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(
    ("adapter", "llm"),
    [
        *(("lora", "llama"), ("mome", "llama")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("none", "llama"), ("lora_bank", "llama"), ("lora", "qwen2"))
        ),
    ],
)
def test_a_step_is_one_graph_and_finds_the_same_ids(adapter: str, llm: str) -> None:
    config = replace(tiny.settings(("image", "audio"), adapter=False), adapter=ADAPTERS[adapter])
    model, processor = build(config, LLMS[llm]), tiny.processor(config)
    rows = [([tiny.random_media("image"), "what is it"], ""), ([tiny.random_media("audio", 20), "say it"], "")]
    batch = tiny.batch(processor, rows)
    batch = replace(
        batch, rows=[replace(row, task=task) for row, task in zip(batch.rows, ("vqa", "speech"), strict=True)]
    )
    budgets = [[Budget.parse("image=4"), Budget.parse("audio=/4")]]
    inputs: dict[str, Any] = processor.expand(batch, budgets, left_padding=True).inputs
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options["suppress_tokens"] = sorted(processor.placeholder_ids.values())
    expected = model.generate(**inputs, **options)
    torch._dynamo.reset()
    counters.clear()
    static_ids = model.generate(**inputs, **options, cache_implementation="static", compile_config=whole_graph())
    assert torch.equal(static_ids, expected)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "it is captured anew for every token"


def test_a_static_cache_gives_the_same_answers(tmp_path: Path) -> None:
    config = tiny.settings(("image",), adapter=False, image={"compressor": {"order": "haar"}, "budgets": [4, 16, 64]})
    answerer = Answerer(build(config, LLMS["llama"]), tiny.processor(config), Decoding(max_new_tokens=NEW_TOKENS))
    static = replace(answerer, decoding=replace(answerer.decoding, static_cache=True))
    request: dict[str, Any] = {"image": tmp_path / tiny.write_media(tmp_path)["image"], "budget": "image=16"}
    questions = ("how many objects?", "what is the letter here?")
    expected = answerer.answer_questions(questions, **request)
    assert [answer.text for answer in static.answer_questions(questions, **request)] == [
        answer.text for answer in expected
    ]
    with pytest.raises(ValueError, match="static_cache is true with num_beams 3"):
        Decoding(3, static_cache=True)
