"""The page in a real browser with vLLM behind it: its answers are those of `Answerer`, and no overlay is promised."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from browser import Page, chromium, skip_without_browser
from engine_runs import MAX_NEW_TOKENS, answerer_of, needs_vllm, write_export
from toy_server import Running, server

skip_without_browser()
pytestmark = needs_vllm
QUESTION = "what is this?"
LEFT = "\ue012"
"""The key as WebDriver writes it."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with images, audio and lips."""
    return write_export(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(exported: Path) -> Iterator[Running]:
    """The server with its page, over one engine."""
    words = ["--engine", "vllm", "--page", "true", "--requests.max_new_tokens", str(MAX_NEW_TOKENS)]
    with server(exported, *words, use_cpu=False, seconds=900) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, served: Running) -> Iterator[Page]:
    """The page, opened."""
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        page.open(f"{served.address}/page")
        yield page


def test_an_answer_and_its_count_change_with_the_slider(page: Page, exported: Path, tmp_path: Path) -> None:
    image = tmp_path / tiny.write_media(tmp_path, seed=0)["image"]
    answerer = answerer_of(exported)
    page.upload("image", image)
    page.type(QUESTION)
    answers = []
    for count in (64, 16):
        page.until(lambda count=count: page.text("image-line").startswith(f"image={count}: {count} soft tokens"))
        text, used = page.ask()
        expected = answerer.answer(QUESTION, image=image, budget=f"image={count}")
        assert text == expected.text
        assert used.startswith(f"soft tokens: image {count} ")
        answers.append(text)
        page.move("image-budget", LEFT)
    assert answers[0] != answers[1]
