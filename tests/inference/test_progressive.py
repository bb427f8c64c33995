"""What a growing budget promises: the logits and answers of a prompt read anew, and a reason where it cannot grow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_models import LLMS, build

from mllm.budget import Budget
from mllm.config.model import LoraBankConfig
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.reading import read_request

COMPRESSORS: dict[str, dict[str, Any]] = {
    "query": {"compressor": "query", "budgets": [2, 5, 16]},
    "query with content keys": {"compressor": {"kind": "query", "keys": "content"}, "budgets": [2, 5, 16]},
    "haar": {"compressor": {"order": "haar"}, "budgets": [4, 16, 64]},
}
QUESTIONS = ("how many objects?", "what is the letter here?")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    return folder / tiny.write_media(folder)["image"]


def make(image: dict[str, Any], *, llm: str = "llama", adapter: Any = None, decoding: Any = None) -> Answerer:
    config = replace(tiny.settings(("image",), adapter=False, image=image), adapter=adapter)
    return Answerer(build(config, LLMS[llm]), tiny.processor(config), decoding or Decoding(max_new_tokens=6))


def from_scratch(answerer: Answerer, image: Path, text: str, budget: str) -> torch.Tensor:
    """The first logits of a prompt that is read in one pass."""
    questions = read_request({"image": image}, [text], budget, answerer.processor)
    samples, media, budget_read = questions.samples, questions.windows[0].media, questions.budget
    batch = answerer.processor.batch(samples, [media], for_training=False)
    inputs = answerer.processor.expand(batch, [[budget_read]], left_padding=True).inputs
    with torch.no_grad():
        return answerer.model(**inputs).logits[0, -1]


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_grown_budget_is_that_budget(name: str, llm: str, image: Path) -> None:
    answerer = make(COMPRESSORS[name], llm=llm)
    budgets = [f"image={count}" for count in COMPRESSORS[name]["budgets"]]
    session = answerer.begin(image=image, budget=budgets[0])
    for step, budget in enumerate(budgets):
        if step:
            session.extend(budget)
        for text in QUESTIONS:
            expected = from_scratch(answerer, image, text, budget)
            assert (session.logits(text) - expected).abs().max() <= 1e-5 * expected.abs().max()
            answer, alone = session.answer(text), answerer.answer(text, image=image, budget=budget)
            assert answer == replace(alone, num_shared_tokens=session.num_read_tokens)
    assert str(session.budget) == budgets[-1]


@pytest.mark.parametrize("decoding", [Decoding(3, 6), Decoding(max_new_tokens=6, temperature=0.8, seed=4)])
def test_beams_and_samples_are_those_of_the_answerer(decoding: Decoding, image: Path) -> None:
    tasks = LoraBankConfig(variant="t", rank=4, alpha=8, tasks=["vqa", "image"])
    answerer = make(COMPRESSORS["query"], adapter=tasks, decoding=decoding)
    session = answerer.begin(image=image, budget="image=2")
    session.extend("image=16")
    alone = answerer.answer(image=image, budget="image=16")
    assert session.answer().text == alone.text
    assert session.answer().text == alone.text, "the second finds the image read"


def test_the_image_is_encoded_once_and_only_new_tokens_are_read(image: Path) -> None:
    answerer = make(COMPRESSORS["query"])
    seen: dict[str, list[int]] = {"images": [], "positions": []}
    answerer.model.model.encoder("image").register_forward_pre_hook(lambda _, args: seen["images"].append(len(args[0])))
    answerer.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen["positions"].append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    session = answerer.begin(image=image, budget="image=5")
    before, question = session.num_kept_tokens - 5, session.num_question_tokens(QUESTIONS[0])
    session.logits(QUESTIONS[0])
    session.extend("image=9")
    session.extend("image=16")
    assert (session.num_read_tokens, session.num_kept_tokens) == (before + 5, before + 16)
    session.logits(QUESTIONS[0])
    session.logits(QUESTIONS[0])
    assert session.answer(QUESTIONS[0]).num_shared_tokens == session.num_read_tokens == before + 16
    assert seen["images"] == [1]
    assert seen["positions"][:4] == [before + 5 + question, 11 + question, question, question]


def test_what_cannot_grow_is_refused_with_a_reason(image: Path) -> None:
    session = make(COMPRESSORS["query"]).begin(image=image, budget="image=5")
    for budget in ("image=5", "image=2"):
        with pytest.raises(ValueError, match=r"gives \d soft tokens; the session has 5"):
            session.extend(budget)
    with pytest.raises(ValueError, match="allowed"):
        session.extend(Budget.parse("image=9999"))
    pooled = make({"budgets": [4, 16]}).begin(image=image, budget="image=4")
    with pytest.raises(ValueError, match=r"compressor gives pooled tokens.*order haar"):
        pooled.extend("image=16")
    scales = LoraBankConfig(variant="ss", rank=4, alpha=8)
    by_scale = make(COMPRESSORS["query"], adapter=scales).begin(image=image, budget="image=2")
    with pytest.raises(ValueError, match="an expert per scale"):
        by_scale.extend("image=16")


def test_a_session_is_about_one_image_and_keeps_a_growing_cache(image: Path) -> None:
    answerer = make(COMPRESSORS["query"])
    with pytest.raises(ValueError, match="about one image, got 2"):
        answerer.begin(image=[image, image], budget="image=2")
    with pytest.raises(ValueError, match="static_cache is true"):
        replace(answerer, decoding=Decoding(static_cache=True)).begin(image=image, budget="image=2")
