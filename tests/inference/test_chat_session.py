"""A chat answers as the whole conversation asked at once would be, encodes files once, and outlives what goes wrong."""

import io
from pathlib import Path

import pytest
import tiny

from mllm.checkpoints.build import build
from mllm.checkpoints.load import save_run
from mllm.cli import main
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.chat import ChatSession
from mllm.media import MediaError
from mllm.model.trainables import set_trainables

CONFIG = tiny.settings()


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(tiny.model(CONFIG, seed=3), tiny.processor(CONFIG), Decoding(max_new_tokens=8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A real image, audio and video."""
    folder = tmp_path_factory.mktemp("chat")
    return {medium: str(folder / name) for medium, name in tiny.write_media(folder, seed=1).items()}


def conversation(files: dict[str, str], *turns: str) -> Sample:
    """A conversation of questions and answers in turn, the image in the first of them."""
    messages = []
    for number, text in enumerate(turns):
        parts = (Media("image", Path(files["image"]).name),) if number == 0 else ()
        messages.append(Message("assistant" if number % 2 else "user", (*parts, Text(text))))
    return Sample("whole", tuple(messages), task="generate", root=Path(files["image"]).parent)


def test_later_questions_are_answered_behind_everything_that_was_said(
    answerer: Answerer, files: dict[str, str]
) -> None:
    chat = ChatSession(answerer)
    chat.set_budget("image=4")
    chat.add("image", files["image"])
    first = chat.ask("what is it?")
    assert first.text == answerer.answer("what is it?", image=files["image"], budget="image=4").text
    second = chat.ask("and now?")
    whole = conversation(files, "what is it?", first.text, "and now?")
    assert second == answerer.answer_samples([whole], ["image=4"])[0]
    chat.set_budget("image=16")
    third = chat.ask("why?")
    whole = conversation(files, "what is it?", first.text, "and now?", second.text, "why?")
    assert third == answerer.answer_samples([whole], ["image=16"])[0]
    assert third.tokens == {"image": 16}


def test_files_are_encoded_when_they_come_and_not_with_every_question(
    answerer: Answerer, files: dict[str, str]
) -> None:
    calls = []
    handle = answerer.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    chat = ChatSession(answerer)
    chat.add("image", files["image"])
    for text in ("what is it?", "and now?", "why?"):
        chat.ask(text)
    chat.set_budget("image=1")
    chat.ask("how many?")
    handle.remove()
    assert len(calls) == 1


def test_a_question_that_fails_leaves_the_conversation_as_it_was(answerer: Answerer, files: dict[str, str]) -> None:
    chat = ChatSession(answerer)
    chat.add("image", files["image"])
    first = chat.ask("what is it?")
    chat.set_budget("image=65")
    with pytest.raises(ValueError, match=r"image=65"):
        chat.ask("and now?")
    chat.set_budget("")
    with pytest.raises(MediaError, match=r"nowhere\.png"):
        chat.add("image", "nowhere.png")
    whole = conversation(files, "what is it?", first.text, "and now?")
    assert chat.ask("and now?") == answerer.answer_samples([whole], [""])[0]
    assert chat.files == [("image", files["image"])]


def test_without_history_every_question_stands_alone_behind_all_files(
    answerer: Answerer, files: dict[str, str]
) -> None:
    chat = ChatSession(answerer, remembers=False)
    chat.add("image", files["image"])
    chat.ask("what is it?")
    chat.add("audio", files["audio"])
    alone = answerer.answer("and now?", image=files["image"], audio=files["audio"])
    assert chat.ask("and now?").text == alone.text
    chat.clear()
    with pytest.raises(ValueError, match="nothing to answer"):
        chat.ask()
    chat.add("audio", files["audio"])
    assert chat.ask().text == answerer.answer(audio=files["audio"]).text  # the default question


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run folder of a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("chat_run")
    model, processor = build(tiny.settings_on(tiny.write_parts(folder / "parts")))
    set_trainables(model)
    save_run(model, processor, folder / "run")
    return str(folder / "run")


def test_errors_in_a_pipe_do_not_end_the_chat(
    run: str, files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        *(f"/image {files['image']}", "/budget image=4", "what is it?", "", "/image nowhere.png", "/imag x"),
        *("/budget image=nonsense", "/clear please", "//slash?", "/files", "/quit", "never asked"),
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", "--model", run, "--max-new-tokens", "4", "--history", "false"]) == 1
    shown = capsys.readouterr()
    alone = ["generate", "--model", run, "--image", files["image"], "--budget", "image=4", "--max-new-tokens", "4"]
    answers = []
    for text in ("what is it?", "/slash?"):
        assert main([*alone, "--text", text]) == 0
        answers.append(capsys.readouterr().out)
    assert shown.out == "".join(answers)
    for said in ("nowhere.png: ", "there is no command /imag; there are /image", "'nonsense' is not a count"):
        assert said in shown.err
    assert "/clear takes nothing behind it, got 'please'" in shown.err
    assert f"image {files['image']}" in shown.err
    assert shown.err.count("soft tokens: image 4;") == 2


def test_a_chosen_budget_of_no_media_is_not_told(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/budget auto\nwhat?\n"))
    assert main(["chat", "--model", run, "--max-new-tokens", "2"]) == 0
    assert "soft tokens: none; prompt " in capsys.readouterr().err


def test_a_line_that_is_no_text_is_refused_and_the_next_is_answered(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nwhat?\n"), encoding="utf-8"))
    assert main(["chat", "--model", run, "--max-new-tokens", "2"]) == 1
    shown = capsys.readouterr()
    assert "the question is not Unicode text" in shown.err
    assert shown.err.count("soft tokens: none; prompt ") == 1
