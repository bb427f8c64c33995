"""What generation promises: batch mates, beams and other budgets change nothing, and what was used is told exactly."""

import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import torch
from PIL import Image
from tiny_models import BUDGETS, ROWS

from mllm.budget import Budget
from mllm.inference.answerer import DEFAULT_PROMPTS, Answerer, Decoding, request
from mllm.media import MediaError, load_video

CONFIG = tiny.settings()


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    # Sharpened, so that a random model has clear favourites and rounding cannot decide between them.
    return Answerer(tiny.model(CONFIG, seed=3), tiny.processor(CONFIG), Decoding(max_new_tokens=12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real png and a real wav of 0.6 seconds, in different folders."""
    made = tmp_path_factory.mktemp("media")
    (made / "sounds").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(made / "an image.png")
    samples = (8000 * np.sin(np.arange(9600) * 2 * math.pi * 300 / 16000)).astype("<i2")
    with wave.open(str(made / "sounds" / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    return made


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_of_mixed_media_and_budgets_answers_as_each_row_alone(answerer: Answerer, num_beams: int) -> None:
    answerer = Answerer(answerer.model, answerer.processor, Decoding(num_beams=num_beams, max_new_tokens=12))
    together = answerer.answer_batch(tiny.batch(answerer.processor, ROWS), [BUDGETS])[0]
    alone = [
        answerer.answer_batch(tiny.batch(answerer.processor, [row]), [[budget]])[0][0]
        for row, budget in zip(ROWS, BUDGETS, strict=True)
    ]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.num_new_tokens for answer in together] == [answer.num_new_tokens for answer in alone]
    assert len({answer.text for answer in together}) == len(ROWS)  # the rows really are different requests


@pytest.mark.parametrize("num_beams", [1, 3])
def test_budgets_answered_together_are_those_answered_one_by_one(answerer: Answerer, num_beams: int) -> None:
    answerer = Answerer(answerer.model, answerer.processor, Decoding(num_beams=num_beams, max_new_tokens=12))
    batch = tiny.batch(answerer.processor, ROWS[:2])
    budgets = [Budget.parse(text) for text in ("image=64,audio=/4", "image=1,audio=/8,video=/5", "image=3")]
    calls = []
    handle = answerer.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    together = answerer.answer_batch(batch, [[budget] * 2 for budget in budgets])
    handle.remove()
    assert len(calls) == 1
    for answers, budget in zip(together, budgets, strict=True):
        alone = answerer.answer_batch(batch, [[budget] * 2])[0]
        assert [answer.text for answer in answers] == [answer.text for answer in alone]
        assert {answer.budget for answer in answers} == {budget}


def test_an_answer_about_files_tells_what_it_used(answerer: Answerer, folder: Path) -> None:
    image, tone = folder / "an image.png", folder / "sounds" / "tone.wav"
    answer = answerer.answer(
        "what is it?", image=[image, str(image)], audio=tone, budget="image=5,audio=/8", timed=True
    )
    assert answer.tokens == {"image": 10, "audio": 30 // 8}
    assert not answer.is_trained  # 5 tokens lie between the trained ones
    assert answer.timing is not None
    assert min(answer.timing.encoder_ms, answer.timing.prefill_ms, answer.timing.decode_ms) > 0
    assert answer.num_new_tokens <= 12
    again = answerer.answer("what is it?", image=image, audio=tone, budget="image=4,audio=12.5/s")
    assert again.tokens == {"image": 4, "audio": 7}
    assert again.is_trained  # 12.5 tokens per second of 50 frames is the trained rate 4
    assert again.timing is None


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_pieces_of_a_stream_are_the_answer(answerer: Answerer, folder: Path, num_beams: int) -> None:
    answerer = Answerer(answerer.model, answerer.processor, Decoding(num_beams=num_beams, max_new_tokens=12))
    pieces: list[str] = []
    answer = answerer.answer("what is it?", image=folder / "an image.png", on_text=pieces.append)
    assert "".join(pieces).strip() == answer.text
    assert answer.text
    assert (len(pieces) > 1) == (num_beams == 1)


def test_files_are_asked_about_in_order_with_a_default_question(folder: Path) -> None:
    sample, names, _ = request({"audio": str(folder / "sounds" / "tone.wav"), "image": folder / "an image.png"}, "why?")
    assert [(part.medium, part.path) for part in sample.media] == [
        ("image", "an image.png"),
        ("audio", "sounds/tone.wav"),
    ]
    assert sample.root == folder.resolve()
    assert names["an image.png"] == str(folder / "an image.png")
    request_made, *_ = request({"video": "x.mp4", "audio": ["y.wav"]})
    assert request_made.messages[0].text == DEFAULT_PROMPTS["audio", "video"]
    with pytest.raises(ValueError, match="no default question about image and audio together"):
        request({"image": "x.png", "audio": "y.wav"})
    with pytest.raises(ValueError, match="nothing to answer"):
        request({})


def test_a_file_behind_a_link_may_be_named(answerer: Answerer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link.wav").symlink_to(folder / "sounds" / "tone.wav")
    assert answerer.answer(audio=tmp_path / "link.wav").tokens == {"audio": 7}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("audio=/50", "too short"),
        ("audio=64", "cannot give more tokens than frames"),
        ("audio=13/s", "nearest: "),
        ("video=/2", "names video, but the request holds none"),
        ("audio=four", "is not a count"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(answerer: Answerer, folder: Path, budget: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answerer.answer(audio=folder / "sounds" / "tone.wav", budget=budget)


def test_a_file_that_cannot_be_read_is_named_as_it_was_given(answerer: Answerer, folder: Path) -> None:
    broken = folder / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(MediaError, match=f"^{broken}: "):
        answerer.answer(image=broken, text="what?")
    with pytest.raises(MediaError, match=f"^{folder / 'absent.wav'}: .*missing"):
        answerer.answer(audio=folder / "absent.wav")


def test_a_checkpoint_cannot_make_answers_random_and_a_seed_makes_samples_repeatable(answerer: Answerer) -> None:
    batch = tiny.batch(answerer.processor, ROWS[:2])
    before = answerer.answer_batch(batch, [BUDGETS[:2]])
    config = answerer.model.generation_config
    beams = Answerer(answerer.model, answerer.processor, Decoding(max_new_tokens=12, num_beams=3))
    before_beams = beams.answer_batch(batch, [BUDGETS[:2]])
    # As chat checkpoints have it, and more.
    sampling = {
        "do_sample": True,
        "temperature": 0.6,
        "repetition_penalty": 1.3,
        "early_stopping": True,
        "min_length": 99,
    }
    sampling |= {"length_penalty": -5.0, "num_return_sequences": 2, "min_new_tokens": 9}
    try:
        config.update(**sampling)
        assert answerer.answer_batch(batch, [BUDGETS[:2]]) == before
        assert beams.answer_batch(batch, [BUDGETS[:2]]) == before_beams
    finally:
        config.update(**dict.fromkeys(sampling))
    state = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        sampled = Answerer(answerer.model, answerer.processor, Decoding(max_new_tokens=12, temperature=1.0, seed=seed))
        drawn.append(sampled.answer_batch(batch, [BUDGETS[:2]]))
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_long_answer_is_favoured_by_the_length_penalty(answerer: Answerer) -> None:
    batch = tiny.batch(answerer.processor, ROWS[:1])
    free = answerer.answer_batch(batch, [BUDGETS[:1]])[0][0]
    first = answerer.processor.tokenizer(f" {free.text}", add_special_tokens=False)["input_ids"][0]
    answerer.model.generation_config.eos_token_id = [first]
    try:
        lengths = []
        for penalty in (0.0, 9.0):
            beams = Decoding(num_beams=4, max_new_tokens=12, length_penalty=penalty)
            patient = Answerer(answerer.model, answerer.processor, beams)
            lengths.append(patient.answer_batch(batch, [BUDGETS[:1]])[0][0].num_new_tokens)
    finally:
        answerer.model.generation_config.eos_token_id = answerer.processor.tokenizer.eos_token_id
    assert lengths[0] == 1 < lengths[1]


def test_an_answer_ends_where_the_llm_says(answerer: Answerer) -> None:
    batch = tiny.batch(answerer.processor, ROWS[:1])
    free = answerer.answer_batch(batch, [BUDGETS[:1]])[0][0]
    assert free.num_new_tokens == 12
    words = answerer.processor.tokenizer(f" {free.text}", add_special_tokens=False)["input_ids"]
    answerer.model.generation_config.eos_token_id = [words[3]]
    try:
        stopped = answerer.answer_batch(batch, [BUDGETS[:1]])[0][0]
    finally:
        answerer.model.generation_config.eos_token_id = answerer.processor.tokenizer.eos_token_id
    assert stopped.num_new_tokens == words.index(words[3]) + 1
    assert free.text.startswith(stopped.text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"temperature": 0.5, "num_beams": 2}, "num_beams 1"),
        ({"length_penalty": 0.5}, "it compares beams"),
    ],
)
def test_decoding_refuses_what_makes_no_sense(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**values)


def test_media_at_hand_are_answered_about_as_their_files(answerer: Answerer, folder: Path) -> None:
    file, tone = folder / "an image.png", folder / "sounds" / "tone.wav"
    samples, rate = soundfile.read(tone, dtype="int16")
    request_made: dict[str, Any] = {"text": "what is it?", "budget": "image=5,audio=/8"}
    expected = answerer.answer(image=file, audio=tone, **request_made)
    for image, audio in (
        (Image.open(file), (samples, rate)),
        (np.asarray(Image.open(file)), {"array": samples, "sampling_rate": rate}),
        (file.read_bytes(), tone.read_bytes()),
        ([file], [samples]),
    ):
        answer = answerer.answer(image=image, audio=audio, **request_made)
        assert (answer.text, answer.tokens) == (expected.text, expected.tokens)
    several = answerer.answer_questions(["what is it?", "why?"], image=[Image.open(file), file])
    assert [answer.tokens for answer in several] == [{"image": 128}] * 2
    session = answerer.begin(image=Image.open(file), budget={"image": 4})
    assert session.answer("why?").text == answerer.answer("why?", image=file, budget="image=4").text


def test_a_budget_for_audio_hears_the_video(answerer: Answerer, tmp_path: Path) -> None:
    """As on the command line: there is one file, and its frames and its audio are of one clip."""
    names = tiny.write_media(tmp_path)
    tiny.write_clip(tmp_path / "0.mp4", tmp_path / "0.wav", tmp_path / "clip.mkv")
    clip = tmp_path / "clip.mkv"
    both = answerer.answer(video=clip, budget="audio=/4,video=/2")
    assert both.tokens == {"audio": 10, "video": 10}
    assert both.text == answerer.answer(video=clip, audio=clip, budget="audio=/4,video=/2").text
    for form in (str(clip), [clip], clip.read_bytes(), clip.open("rb")):
        assert answerer.answer(video=form, budget={"audio": "/4", "video": "/2"}).text == both.text
    assert answerer.answer(video=clip, budget="video=/2").tokens == {"video": 10}
    frames = load_video(clip)
    with pytest.raises(ValueError, match="the budget 'audio=/4' names audio, but the request holds none"):
        answerer.answer(video=frames, budget="audio=/4")
    with pytest.raises(MediaError, match=r"0\.mp4: the file has no audio stream"):
        answerer.answer(video=tmp_path / names["video"], budget="audio=/4")


@pytest.mark.parametrize("budget", [16, "16"])
def test_a_bare_number_is_no_budget(answerer: Answerer, folder: Path, budget: Any) -> None:
    with pytest.raises(ValueError, match=r'budget is \S+, which does not say of what; write the medium: "image=16"'):
        answerer.answer("what is it?", image=folder / "an image.png", budget=budget)
