"""What lmms-eval hands over is read as it is meant, or refused; needs no lmms-eval."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny_routers import image_router

from mllm.budget import Budget
from mllm.data.manifest import Media, Text
from mllm.inference.answerer import Answerer, Decoding
from mllm.lmms.answering import BudgetedAnswers, Request, read_budget
from mllm.lmms.conversation import DEFAULT_NEW_TOKENS, Generation, read_conversation, read_generation, read_medium
from mllm.media import Audio, MediaError, MediaLoader

CONFIG = tiny.settings()


def test_decoding_arguments_mean_what_tasks_mean() -> None:
    greedy = Decoding(max_new_tokens=16)
    assert read_generation({"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1}).decoding == greedy
    assert (
        read_generation({"max_new_tokens": 16, "do_sample": False, "temperature": 0.7, "top_p": 0.9}).decoding == greedy
    )
    assert read_generation({"max_new_tokens": 16, "do_sample": True, "temperature": 0.0}).decoding == greedy
    assert read_generation({}).decoding == Decoding(max_new_tokens=DEFAULT_NEW_TOKENS)
    assert read_generation({"do_sample": True}, repeat=2).decoding == Decoding(
        max_new_tokens=DEFAULT_NEW_TOKENS, temperature=1.0, seed=2
    )
    assert read_generation({"temperature": 0.5, "top_p": 1.0}).decoding.temperature == 0.5
    assert read_generation({"num_beams": 3, "length_penalty": 0.5}).decoding.num_beams == 3


def test_an_answer_ends_before_the_first_stop() -> None:
    assert read_generation({"until": ["\n\n", "", "END"]}).stops == ("\n\n", "END")
    assert read_generation({"until": ","}).cut("red, blue") == "red"
    assert Generation(Decoding(), ("b", "x")).cut("a x b") == "a"
    assert Generation(Decoding()).cut(" as it is ") == "as it is"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tokens": 3}, "'max_tokens' is not known here; allowed: max_new_tokens"),
        ({"temperature": 0.7, "top_p": 0.9}, "top_p is 0.9"),
        ({"do_sample": True, "top_k": 50}, "top_k is 50"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
        ({"temperature": 0.7, "num_beams": 2}, "num_beams 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_decoding_that_this_model_does_not_do_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_generation(arguments)


def test_an_argument_for_other_models_is_told(caplog: pytest.LogCaptureFixture) -> None:
    read_generation({"image_aspect_ratio": "pad-told"})
    assert "image_aspect_ratio=pad-told" in caplog.text


def test_a_conversation_keeps_its_order() -> None:
    image = Image.new("RGB", (4, 4))
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": image}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "audio", "url": "c.wav"}, {"type": "text", "text": "d"}]},
    ]
    sample, sources = read_conversation("doc 1", turns)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user"]
    assert sample.messages[1].parts == (Text("a"), Media("image", ""))
    assert sources == [("image", image), ("audio", "c.wav")]
    parted, _ = read_conversation("doc 1", turns, separator="\n")
    assert [message.text for message in parted.messages] == ["be brief", "a", "b", "\nd"]
    assert read_conversation("doc 1", [{"role": "user", "content": "a"}], separator="\n")[0].messages[0].text == "a"
    for part, words in [
        ({"type": "image_url", "url": "x"}, "'image_url'; allowed: text, image, audio, video"),
        ({"type": "video", "url": "x.mp4", "start_time": 1.0}, "start_time"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_conversation("doc 1", [{"role": "user", "content": [part]}])


def test_media_are_read_in_every_form_that_data_sets_have(tmp_path: Path) -> None:
    names = tiny.write_media(tmp_path)
    loader = MediaLoader(gray=True)
    path = str(tmp_path / names["image"])
    image = read_medium("image", Image.open(path), loader)
    assert np.array_equal(np.asarray(image), np.asarray(read_medium("image", path, loader)))
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert np.asarray(read_medium("image", clear, loader)).tolist() == [[[255] * 3] * 3] * 2  # on white, as files are
    samples = np.random.default_rng(0).normal(0, 0.1, (2, 8000)).astype(np.float32)
    audio = read_medium("audio", {"array": samples, "sampling_rate": 8000}, loader)
    assert isinstance(audio, Audio)
    assert (audio.sample_rate_hz, len(audio.samples)) == (16_000, 16_000)
    mono = read_medium("audio", {"array": samples.mean(axis=0), "sampling_rate": 8000}, loader)
    assert np.allclose(audio.samples, mono.samples, atol=1e-6)
    with pytest.raises(ValueError, match="image comes as bytes"):
        read_medium("image", b"png", loader)
    with pytest.raises(MediaError, match="missing"):
        read_medium("audio", str(tmp_path / "none.wav"), loader)


def test_budgets_are_read_with_a_plus_and_refused_at_once() -> None:
    made = tiny.processor(CONFIG)
    assert read_budget("image=16+audio=/4+total<=99", made) == Budget.parse("image=16,audio=/4,total<=99")
    assert read_budget("auto+quality>=0.98+total<=99", made) == Budget.parse("auto,quality>=0.98,total<=99")
    with pytest.raises(ValueError, match=r"budget is missing.*budget=image=64\+audio=/4\+video=/2"):
        read_budget("", made)
    with pytest.raises(ValueError, match="must be medium=amount"):
        read_budget(64, made)
    with pytest.raises(ValueError, match=r"allowed are counts 1\.\.64"):
        read_budget("image=65", made)
    with pytest.raises(ValueError, match="names video; this model takes image"):
        read_budget("video=/2", tiny.processor(tiny.settings(("image",))))


def test_every_request_is_answered_at_every_budget_as_alone(tmp_path: Path) -> None:
    made, model = tiny.processor(CONFIG), tiny.model(CONFIG, seed=3)
    paths = [str(tmp_path / tiny.write_media(tmp_path, seed=seed)["image"]) for seed in range(3)]
    budgets = [Budget.parse(text) for text in ("image=64", "image=1", "image=5")]
    lengths = [8, 3, 8]  # two ways of decoding

    def request(path: str, length: int) -> Request:
        turn = {"role": "user", "content": [{"type": "image", "url": path}, {"type": "text", "text": "what is it?"}]}
        return Request(path, read_generation({"max_new_tokens": length}), lambda: [turn])

    batch_sizes: list[int] = []
    requests = [request(path, length) for path, length in zip(paths, lengths, strict=True)]
    answered = BudgetedAnswers(model, made, budgets, batch_size=2)(requests, batch_sizes.append)
    assert batch_sizes == [2, 1]
    for path, length, answers in zip(paths, lengths, answered, strict=True):
        answerer = Answerer(model, made, Decoding(max_new_tokens=length))
        for budget, answer in zip(budgets, answers, strict=True):
            alone = answerer("what is it?", image=path, budget=budget)
            assert (answer.text, answer.tokens, answer.budget) == (alone.text, alone.tokens, budget)
    missing = Request(
        "doc 7",
        Generation(Decoding()),
        lambda: [{"role": "user", "content": [{"type": "image", "url": str(tmp_path / "none.png")}]}],
    )
    with pytest.raises(ValueError, match="missing"):
        BudgetedAnswers(model, made, budgets)([missing], batch_sizes.append)


def test_auto_is_chosen_for_each_request_by_its_router(tmp_path: Path) -> None:
    made, model = tiny.processor(CONFIG), tiny.model(CONFIG, seed=3)
    path = str(tmp_path / tiny.write_media(tmp_path)["image"])
    trained = [Budget.parse(f"image={number}") for number in (1, 4, 16)]
    router = image_router(tiny.llm_config().hidden_size, trained)
    texts = ("what colour is the circle?", "how many objects?", "what is the letter here?", "is it left of it?")
    decoding = read_generation({"max_new_tokens": 4})

    def request(text: str) -> Request:
        turn = {"role": "user", "content": [{"type": "image", "url": path}, {"type": "text", "text": text}]}
        return Request(text, decoding, lambda: [turn])

    asked = BudgetedAnswers(model, made, [read_budget("auto+price=0.001", made)], batch_size=4, router=router)
    answers = [of_budgets[0] for of_budgets in asked([request(text) for text in texts], lambda done: None)]
    alone = Answerer(model, made, Decoding(max_new_tokens=4), router=router)
    expected = [alone(text, image=path, budget="auto,price=0.001") for text in texts]
    assert [(one.text, one.budget, one.tokens) for one in answers] == [
        (one.text, one.budget, one.tokens) for one in expected
    ]
    assert len({one.budget for one in answers}) > 1, "or nothing would have been chosen"
    with pytest.raises(ValueError, match="budget 'auto' needs a router; fit one"):
        BudgetedAnswers(model, made, [Budget.parse("auto")])([request(texts[0])], lambda done: None)
