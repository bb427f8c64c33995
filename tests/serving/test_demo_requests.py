"""On the demo's trained parts, requests of every kind at 32 clients are answered as `Answerer` answers them."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from toy_server import part, server, user

from mllm.checkpoints.load import load
from mllm.cli import main
from mllm.inference.answerer import DEFAULT_PROMPTS, Answerer, Decoding

NUM_REQUESTS, NUM_CLIENTS, MAX_NEW_TOKENS = 200, 32, 16
BUDGETS = {
    "image": ("image=64", "image=16", "image=4"),
    "audio": ("audio=/4", "audio=/8"),
    "video": ("video=/2", "video=/5"),
}
KINDS = (("image",), ("audio",), ("video",), ("audio", "video"), ())
QUESTIONS = ("what colour is the circle?", "how many objects are there?", "describe the image.")
SHORT_DEMO = (
    *("--steps", "4", "--num_utterances", "24", "--num_test_utterances", "8"),
    *("--num_scenes", "24", "--num_test_scenes", "8", "--judge", "false"),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short demo: parts that are trained, a compressor that was fitted to them, and their corpus."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", *SHORT_DEMO, "--out", str(folder)]) == 0
    return folder


def requests_of(demo: Path) -> list[tuple[str, dict[str, bytes], str]]:
    """Questions, media and budgets, of which media come several times and no two requests are alike."""
    rng = random.Random(3)
    images = sorted((demo / "corpus/images/images/test").glob("*.png"))
    clips = sorted((demo / "corpus/speech/speech/test").glob("*.wav"))
    requests = []
    for number in range(NUM_REQUESTS):
        kind = KINDS[number % len(KINDS)]
        clip = rng.choice(clips)
        paths = {"image": rng.choice(images), "audio": clip, "video": clip.with_suffix(".mp4")}
        media = {medium: paths[medium].read_bytes() for medium in kind}
        text = rng.choice(QUESTIONS) if kind in (("image",), ()) else DEFAULT_PROMPTS[kind]
        requests.append((f"{text} {number}", media, ",".join(rng.choice(BUDGETS[medium]) for medium in kind)))
    return requests


@pytest.mark.slow
def test_all_of_200_mixed_requests_have_the_ids_of_the_answerer(demo: Path) -> None:
    requests = requests_of(demo)
    words = ["--requests.max_new_tokens", str(MAX_NEW_TOKENS), "--measure_budgets", "false"]
    with server(demo, *words) as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=300)

        def answer_of(request: tuple[str, dict[str, bytes], str]) -> Any:
            text, media, budget = request
            parts = [part(medium, content) for medium, content in media.items()]
            extra = {"budget": budget, "return_token_ids": True}
            return client.chat.completions.create(model="demo", messages=user(*parts, text), extra_body=extra)  # type: ignore

        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            answers = list(threads.map(answer_of, requests))
    model, processor = load(demo, device="cpu")
    ids_of_answers: list[list[int]] = []
    decode = processor.batch_decode
    # An answer tells no ids: they are taken where they are turned to text.
    processor.batch_decode = lambda ids, **how: (ids_of_answers.extend(ids), decode(ids, **how))[1]  # type: ignore
    answerer = Answerer(model, processor, Decoding(max_new_tokens=MAX_NEW_TOKENS))
    for text, media, budget in requests:
        answerer(text, **media, budget=budget)  # type: ignore[arg-type]
    equal = [list(answer.choices[0].token_ids) == ids for answer, ids in zip(answers, ids_of_answers, strict=True)]
    assert sum(equal) == NUM_REQUESTS
    assert len({answer.choices[0].message.content for answer in answers}) > 20
