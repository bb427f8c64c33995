"""`mllm serve --engine vllm` gives the same API, and the answers of `Answerer`, to many clients at once."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny
from engine_runs import MAX_NEW_TOKENS, answerer_of, needs_vllm, write_export
from toy_server import NAME, Running, data_url, part, server, user

from mllm.inference.answerer import Answerer

BUDGETS = {"image": ("image=64", "image=3"), "audio": ("audio=/4", "audio=/8"), "video": ("video=/2", "video=/5")}
NUM_REQUESTS = 48
pytestmark = needs_vllm


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with images, audio and lips."""
    return write_export(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def answerer(exported: Path) -> Answerer:
    """Answers as the engine should."""
    return answerer_of(exported)


@pytest.fixture(scope="module")
def served(exported: Path) -> Iterator[Running]:
    """The server, over two engines."""
    words = ["--engine", "vllm", "--name", NAME, "--requests.max_new_tokens", str(MAX_NEW_TOKENS)]
    with server(exported, *words, "--data_parallel", "2", use_cpu=False, seconds=900) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    """OpenAI's client, which asks once and not again."""
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Some real media, by medium."""
    folder = tmp_path_factory.mktemp("files")
    written = [tiny.write_media(folder, seed=seed) for seed in range(4)]
    return [{medium: (folder / name).read_bytes() for medium, name in names.items()} for names in written]


def ask(client: openai.OpenAI, *parts: Any, body: dict[str, Any] | None = None, **options: Any) -> Any:
    """One answer; `body` is what OpenAI's client does not know."""
    return client.chat.completions.create(model=NAME, messages=user(*parts), extra_body=body, **options)  # type: ignore


def test_answers_at_concurrent_clients_are_those_of_the_answerer(
    client: openai.OpenAI, answerer: Answerer, files: list[dict[str, bytes]]
) -> None:
    rng = random.Random(0)
    requests = []
    for number in range(NUM_REQUESTS):
        media = [medium for medium in BUDGETS if rng.random() < 0.6]
        content = {medium: rng.choice(files)[medium] for medium in media}
        named = ",".join(rng.choice(BUDGETS[medium]) for medium in media)
        requests.append((f"what is it? {number % 3}", content, rng.choice((named, "total<=90" if media else ""))))

    def answer(request: tuple[str, dict[str, bytes], str]) -> Any:
        text, content, budget = request
        parts = [part(medium, file) for medium, file in content.items()]
        return ask(client, *parts, text, body={"budget": budget, "return_token_ids": True})

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(answer, requests))
    for answer, (text, content, budget) in zip(answers, requests, strict=True):
        wanted = answerer(text, **content, budget=budget)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == wanted.text, (text, budget)
        assert answer.usage.completion_tokens == wanted.num_new_tokens
        assert answer.usage.prompt_tokens == wanted.num_prompt_tokens
    assert len({answer.choices[0].message.content for answer in answers}) > 5


def test_pieces_of_a_stream_are_the_answer(client: openai.OpenAI, files: list[dict[str, bytes]]) -> None:
    parts = [part("image", files[0]["image"]), "what is it?"]
    whole = ask(client, *parts).choices[0].message.content
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(client, *parts, stream=True) if chunk.choices]
    assert "".join(chunks) == whole
    assert whole


def test_what_is_drawn_depends_on_the_seed(client: openai.OpenAI, files: list[dict[str, bytes]]) -> None:
    parts = [part("image", files[0]["image"]), "what is it?"]
    texts = [ask(client, *parts, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 2, 1, 3, 2, 4)]
    assert texts[0] == texts[2]
    assert texts[1] == texts[4]
    assert len(set(texts)) == 4


def test_a_recording_is_transcribed(served: Running, answerer: Answerer, files: list[dict[str, bytes]]) -> None:
    form = {"model": NAME, "budget": "audio=/8", "response_format": "text"}
    response = httpx.post(
        f"{served.url}/audio/transcriptions", data=form, files={"file": files[1]["audio"]}, timeout=60
    )
    assert response.text.strip() == answerer(audio=files[1]["audio"], budget="audio=/8").text


@pytest.mark.parametrize(
    ("budget", "message"),
    [("image=65", r"allowed are counts 1\.\.64"), ("total<=0", "must be"), ("audio=/4", "holds none")],
)
def test_what_cannot_be_met_is_refused(
    client: openai.OpenAI, files: list[dict[str, bytes]], budget: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, part("image", files[0]["image"]), "what?", body={"budget": budget})


def test_text_that_spells_special_tokens_stays_text(client: openai.OpenAI, answerer: Answerer) -> None:
    spelled = "<|image_token|></s> what is it?"
    answer = ask(client, spelled)
    wanted = answerer(spelled)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (wanted.text, wanted.num_prompt_tokens)


def test_budgets_are_told_and_health_and_metrics(served: Running) -> None:
    table = httpx.get(f"{served.url}/budgets").json()["data"]
    assert {row["budget"] for row in table} >= {"image=64", "audio=/8", "video=/5"}
    assert all(row["flops"] > 0 and row["kv_bytes"] > 0 for row in table)
    assert httpx.get(f"{served.address}/health").json() == {"status": "ok"}
    assert "mllm_running_answers 0.0" in httpx.get(f"{served.address}/metrics").text


def test_an_answer_that_nobody_waits_for_ends_within_a_second(served: Running, files: list[dict[str, bytes]]) -> None:
    body = {
        "model": NAME,
        "messages": user(part("image", files[0]["image"]), "what is it?"),
        "stream": True,
        "ignore_eos": True,
    }

    def leave() -> None:
        with httpx.stream("POST", f"{served.url}/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())

    threads = [threading.Thread(target=leave) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(1)
    assert "mllm_running_answers 0.0" in httpx.get(f"{served.address}/metrics").text


def test_a_run_is_refused_with_what_to_do(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mllm.cli import main

    assert main(["serve", "--model", str(exported.parent / "run" / "toy"), "--engine", "vllm"]) != 0
    assert "is a run, and vLLM reads whole models: mllm export" in capsys.readouterr().err


def test_data_urls_of_videos_are_read_by_our_own_loader(
    client: openai.OpenAI, answerer: Answerer, files: list[dict[str, bytes]]
) -> None:
    video = {"type": "video_url", "video_url": {"url": data_url("video", files[2]["video"])}}
    answer = ask(client, video, "what is said?", body={"budget": "video=/2"})
    wanted = answerer("what is said?", video=files[2]["video"], budget="video=/2")
    assert answer.choices[0].message.content == wanted.text
