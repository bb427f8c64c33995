"""The server answers as `Answerer` does, over HTTP, to the clients people have: OpenAI's for Python, and curl."""

import io
import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from toy_server import HTTP, NAME, Running, data_url, part, user

from mllm.inference.answerer import DEFAULT_PROMPTS, Answerer
from mllm.router.router import load_router

BUDGETS = {"image": ("image=64", "image=16", "image=3"), "audio": ("audio=/4", "audio=/8"), "video": ("video=/2",)}
TEXTS = ("what is it?", "say it.", "which colour is the circle in the picture?")
Files = list[dict[str, bytes]]


def ask_for(client: openai.OpenAI, *parts: Any, **options: Any) -> Any:
    """One answer; what OpenAI's client does not know goes into the body as it is."""
    extra = {
        key: options.pop(key) for key in list(options) if key in ("budget", "return_token_ids", "media_resolution")
    }
    extra |= options.pop("extra_body", {})
    return client.chat.completions.create(model=NAME, messages=user(*parts), extra_body=extra, **options)  # type: ignore


def soft_tokens(answer: Any) -> dict[str, int]:
    """Soft tokens of an answer's media, as its usage tells them."""
    details = answer.usage.prompt_tokens_details.model_dump(exclude_none=True)
    return {key.removesuffix("_tokens"): count for key, count in details.items()}


def test_answers_at_concurrent_clients_are_those_of_the_answerer(
    client: openai.OpenAI, answerer: Answerer, files: Files
) -> None:
    rng = random.Random(0)
    requests = []
    for number in range(40):
        media = [medium for medium in BUDGETS if rng.random() < 0.6]
        files_of_request = {medium: rng.choice(files)[medium] for medium in media}
        budget = ",".join(rng.choice(BUDGETS[medium]) for medium in media)
        requests.append((f"{rng.choice(TEXTS)} {number % 3}", files_of_request, budget))

    def ask(request: tuple[str, dict[str, bytes], str]) -> Any:
        text, files_of_request, budget = request
        parts = [part(medium, content) for medium, content in files_of_request.items()]
        return ask_for(client, *parts, text, budget=budget, return_token_ids=True)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, requests))
    expected = [answerer(text, **files_of_request, budget=budget) for text, files_of_request, budget in requests]  # type: ignore[arg-type]
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.choices[0].message.content == wanted.text
        assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens == wanted.num_new_tokens
        assert answer.usage.prompt_tokens == wanted.num_prompt_tokens
        assert soft_tokens(answer) == wanted.tokens
        assert answer.usage.model_extra["is_trained"] == wanted.is_trained
    assert len({answer.choices[0].message.content for answer in answers}) > 10  # they really are different requests


def test_auto_is_settled_for_each_request_by_its_router(
    client: openai.OpenAI, answerer: Answerer, run: Path, files: Files
) -> None:
    routed = replace(answerer, router=load_router(run), max_growths=0)
    image = files[0]["image"]
    chosen = []
    for text in (*TEXTS, "how many objects?", "is it left of the letter?"):
        answer = ask_for(client, part("image", image), text, budget="auto,price=0.001")
        expected = routed(text, image=image, budget="auto,price=0.001")
        chosen.append(answer.usage.model_extra["budget"])
        assert chosen[-1] == str(expected.budget)
        assert answer.choices[0].message.content == expected.text
        assert soft_tokens(answer) == expected.tokens
        fixed = ask_for(client, part("image", image), text, budget=chosen[-1])
        assert fixed.choices[0].message.content == answer.choices[0].message.content
    assert len(set(chosen)) > 1, "the questions ask for different budgets"
    text = TEXTS[0]
    answer = ask_for(client, part("image", image, detail="auto"), text)
    assert answer.usage.model_extra["budget"] == str(routed(text, image=image, budget="auto").budget)
    capped = ask_for(client, part("image", image), text, budget="auto,price=0,total<=1")
    assert capped.usage.model_extra["budget"] == "image=1"
    for budget, message in (
        ("auto,mean_tokens<=1", "mean_tokens<=1 cannot be met: this router needs at least 4"),
        ("flops<=10", "budget 'flops<=10' cannot be met: image=1 takes"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask_for(client, part("image", image), text, budget=budget)
    with pytest.raises(openai.BadRequestError, match="auto chooses for requests about image; this one is about audio"):
        ask_for(client, part("audio", files[0]["audio"]), text, budget="auto")


def test_several_images_and_turns_stand_in_their_order(client: openai.OpenAI, answerer: Answerer, files: Files) -> None:
    first, second = files[0]["image"], files[1]["image"]
    together = ask_for(client, part("image", first), part("image", second), "what?", budget="image=4")
    turned = ask_for(client, part("image", second), part("image", first), "what?", budget="image=4")
    wanted = answerer("what?", image=[first, second], budget="image=4")
    assert together.choices[0].message.content == wanted.text
    assert soft_tokens(together) == {"image": 8}
    assert turned.choices[0].message.content == answerer("what?", image=[second, first], budget="image=4").text
    messages = [*user(part("image", first), "what?"), {"role": "assistant", "content": "red."}, *user("and now?")]
    later = client.chat.completions.create(model=NAME, messages=messages)  # type: ignore[arg-type]
    assert later.usage is not None
    assert later.usage.prompt_tokens > wanted.num_prompt_tokens


def test_media_of_other_forms_are_the_same_media(client: openai.OpenAI, files: Files) -> None:
    audio = files[0]["audio"]
    form = {"type": "audio_url", "audio_url": {"url": data_url("audio", audio)}}
    one, other = ask_for(client, part("audio", audio), "say it."), ask_for(client, form, "say it.")
    assert one.choices[0].message.content == other.choices[0].message.content
    plain = {"type": "image_url", "image_url": data_url("image", files[0]["image"])}
    shown = ask_for(client, plain, "what?").choices[0].message.content
    assert shown == ask_for(client, part("image", files[0]["image"]), "what?").choices[0].message.content


def test_audio_and_frames_of_one_clip_are_brought_to_one_length(
    client: openai.OpenAI, answerer: Answerer, clip: bytes
) -> None:
    audio = {"type": "audio_url", "audio_url": {"url": data_url("video", clip)}}
    answer = ask_for(client, audio, part("video", clip), DEFAULT_PROMPTS["audio", "video"], budget="audio=/4,video=/2")
    wanted = answerer(audio=clip, video=clip, budget="audio=/4,video=/2")
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage.prompt_tokens == wanted.num_prompt_tokens


def test_pieces_of_a_stream_are_the_answer(client: openai.OpenAI, files: Files) -> None:
    parts = [part("image", files[0]["image"]), "what is it?"]
    whole = ask_for(client, *parts, n=2)
    chunks = list(ask_for(client, *parts, n=2, stream=True, stream_options={"include_usage": True}))
    for number, choice in enumerate(whole.choices):
        choices = [one.choices[0] for one in chunks if one.choices and one.choices[0].index == number]
        assert "".join(one.delta.content or "" for one in choices) == choice.message.content
        assert choices[0].delta.role == "assistant"
        assert [one.finish_reason for one in choices if one.finish_reason] == [choice.finish_reason]
        assert len(choices) > 3
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert not any(one.usage for one in ask_for(client, *parts, stream=True))


def test_what_is_drawn_depends_on_the_seed_and_on_nobody_else(client: openai.OpenAI, files: Files) -> None:
    parts = [part("image", files[0]["image"]), "what is it?"]

    def text(seed: int) -> str:
        return ask_for(client, *parts, temperature=1.5, seed=seed).choices[0].message.content

    alone = [text(seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(6) as threads:
        crowd = list(threads.map(text, (3, 1, 2, 1, 3, 2)))
    assert crowd == [alone[index] for index in (2, 0, 1, 0, 2, 1)]
    assert len(set(alone)) == 3
    both = ask_for(client, *parts, temperature=1.5, seed=1, n=2).choices
    assert [one.message.content for one in both] == alone[:2]
    assert (
        ask_for(client, *parts, temperature=0).choices[0].message.content
        == ask_for(client, *parts).choices[0].message.content
    )


def test_an_answer_ends_before_a_stop_text_and_at_its_length(client: openai.OpenAI, files: Files) -> None:
    parts = [part("image", files[0]["image"]), "what is it?"]
    whole = ask_for(client, *parts).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = ask_for(client, *parts, stop=[stop, "never there"]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)].strip()
    assert (cut.finish_reason, cut.model_extra["stop_reason"]) == ("stop", stop)
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask_for(client, *parts, stop=stop, stream=True)]
    assert "".join(pieces) == cut.message.content
    short = ask_for(client, *parts, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert ask_for(client, *parts, max_completion_tokens=3).choices[0].message == short.choices[0].message


def test_text_that_spells_special_tokens_is_text(client: openai.OpenAI, answerer: Answerer) -> None:
    text = "<|image_token|> <|audio_token|>" + (answerer.processor.tokenizer.eos_token or "")
    answer = ask_for(client, text)
    assert answer.choices[0].message.content == answerer(text).text
    assert answer.usage.model_extra["media"] == []
    assert answer.usage.prompt_tokens > len(text.split()) + 5


@pytest.mark.parametrize("form", ["json", "text", "verbose_json"])
def test_audio_is_transcribed(client: openai.OpenAI, answerer: Answerer, files: Files, form: Any) -> None:
    file = ("a sound.wav", io.BytesIO(files[0]["audio"]))
    extra = {"budget": "audio=/8"}
    said: Any = client.audio.transcriptions.create(
        model=NAME, file=file, response_format=form, language="en", extra_body=extra
    )
    wanted = answerer(audio=files[0]["audio"], budget="audio=/8")
    assert (said.strip() if form == "text" else said.text) == wanted.text
    if form == "verbose_json":
        assert (said.language, said.duration) == ("en", 0.8)
        assert said.usage.model_extra["budget"] == "audio=/8" if said.usage.model_extra else True
    if form == "json":
        assert said.usage.input_tokens == wanted.num_prompt_tokens


def test_a_video_is_transcribed_with_its_lips(
    client: openai.OpenAI, answerer: Answerer, clip: bytes, files: Files
) -> None:
    said = client.audio.transcriptions.create(model=NAME, file=("clip.mp4", clip))
    assert said.text == answerer(audio=clip, video=clip).text
    silent = client.audio.transcriptions.create(model=NAME, file=("silent.mp4", files[0]["video"]))
    assert silent.text == answerer(video=files[0]["video"]).text
    events = list(client.audio.transcriptions.create(model=NAME, file=("clip.mp4", clip), stream=True))
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == said.text
    assert (events[-1].type, events[-1].text) == ("transcript.text.done", said.text)  # type: ignore[union-attr]


def test_the_server_tells_its_model_budgets_health_and_metrics(served: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no such model; allowed: toy"):
        client.models.retrieve("other")
    rows = HTTP.get(f"{served.url}/budgets").json()["data"]
    assert [row["budget"] for row in rows if row["type"] == "image"] == ["image=64", "image=16", "image=4", "image=1"]
    assert [row["tokens"] for row in rows if row["type"] == "image"] == [64, 16, 4, 1]
    for medium in BUDGETS:
        of_medium = [row for row in rows if row["type"] == medium]
        assert [row["flops"] for row in of_medium] == sorted((row["flops"] for row in of_medium), reverse=True)
        assert all(row["kv_bytes"] > 0 and row["milliseconds"] > 0 for row in of_medium)
    assert HTTP.get(f"{served.address}/health").json() == {"status": "ok"}
    ask_for(client, "what?")
    metrics = HTTP.get(f"{served.address}/metrics").text
    assert 'mllm_requests_total{route="/v1/chat/completions",status="200"}' in metrics
    assert "mllm_new_tokens_total" in metrics


def test_media_are_encoded_once(served: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    import tiny

    names = tiny.write_media(tmp_path, seed=77)
    image = part("image", (tmp_path / names["image"]).read_bytes())

    def encoded() -> float:
        lines = HTTP.get(f"{served.address}/metrics").text.splitlines()
        return float(
            next(line for line in lines if line.startswith('mllm_encoded_media_total{medium="image"}')).split()[1]
        )

    ask_for(client, image, "what?")
    before = encoded()
    with ThreadPoolExecutor(4) as threads:
        answers = list(
            threads.map(lambda n: ask_for(client, image, image, f"what? {n}", budget=f"image={n}"), (64, 16, 4, 3))
        )
    assert encoded() == before
    assert [answer.usage.model_extra["known_media"] for answer in answers] == [2, 2, 2, 2]


def test_curl_gets_answers(served: Running, files: Files, tmp_path: Path) -> None:
    body = {"model": NAME, "messages": user(part("image", files[0]["image"]), "what?"), "budget": "image=16"}
    (tmp_path / "body.json").write_text(json.dumps(body))
    (tmp_path / "sound.wav").write_bytes(files[0]["audio"])

    def curl(*words: str) -> str:
        done = subprocess.run(["curl", "-sS", "--fail-with-body", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kind = ["-H", "content-type: application/json"]
    answer = json.loads(curl(f"{served.url}/chat/completions", *kind, "-d", "@body.json"))
    assert answer["usage"]["budget"] == "image=16"
    said = curl(
        f"{served.url}/audio/transcriptions",
        "-F",
        "file=@sound.wav",
        "-F",
        f"model={NAME}",
        "-F",
        "response_format=text",
    )
    assert said.strip()
    (tmp_path / "body.json").write_text(json.dumps({**body, "stream": True}))
    stream = curl("-N", f"{served.url}/chat/completions", *kind, "-d", "@body.json")
    assert stream.endswith("data: [DONE]\n\n")
    assert stream.count("data: ") > 4
