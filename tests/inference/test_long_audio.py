"""Audio longer than its encoder's window: what is said of it is what is said of its windows, each word once."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import tiny
from safetensors.torch import load_file, save_file

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.cli import main
from mllm.config.long_audio import LongAudio
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.answer_store import AnswerStore
from mllm.evaluation.comparison import compare
from mllm.evaluation.sweep import Sweep
from mllm.evaluation.work_list import plan
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.long_audio import join_answers, load_windows
from mllm.inference.windows import join_transcripts, window_times
from mllm.media import Audio, MediaError
from mllm.model.trainables import set_trainables
from mllm.transforms.noise import MixNoise
from mllm.utils.random_generator import random_generator

CHUNK = LongAudio(mode="chunk", overlap_seconds=0.2)
SECONDS = 2.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose audio is at most a second long, and a longer audio and a clip of it."""
    made = tmp_path_factory.mktemp("long")
    parts = tiny.write_parts(made / "parts", initializer_range=0.3)
    weights = load_file(made / "parts" / "audio" / "model.safetensors")
    # Else a random Whisper hears little but the time, and a random model says one thing about every window.
    louder = {name: value * 40 if "conv" in name and value.dim() > 1 else value for name, value in weights.items()}
    save_file(louder, made / "parts" / "audio" / "model.safetensors", metadata={"format": "pt"})
    model, processor = build(tiny.settings_on(parts))
    set_trainables(model, ("compressors", "adapter"))
    save_run(model, processor, made / "run")
    rng = np.random.default_rng(0)
    clock = np.arange(1600) / 16_000
    pitches, levels = rng.uniform(100, 4000, 26), rng.uniform(0.001, 0.5, 26)
    tones = [level * np.sin(6.28 * pitch * clock) for pitch, level in zip(pitches, levels, strict=True)]
    samples = np.concatenate(tones) + rng.normal(0, 0.001, 26 * 1600)
    soundfile.write(made / "long.wav", samples.astype(np.float32), 16_000, subtype="FLOAT")
    tiny.write_media(made, seconds=SECONDS, seed=1)
    (made / "long.mp4").write_bytes((made / "1.mp4").read_bytes())
    soundfile.write(made / "short.wav", samples[:8000].astype(np.float32), 16_000, subtype="FLOAT")
    return made


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return Answerer(*load(folder / "run"), Decoding(max_new_tokens=8), long_audio=CHUNK)


def cut_files(folder: Path, out: Path) -> list[tuple[Path, Path]]:
    """The audio and the video of each window as files of their own, cut by hand."""
    samples, _ = soundfile.read(folder / "long.wav", dtype="float32")
    with av.open(str(folder / "long.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    made = []
    for number, (start, stop) in enumerate(window_times(SECONDS, 1.0, 0.2)):
        soundfile.write(
            out / f"{number}.wav", samples[round(start * 16_000) : round(stop * 16_000)], 16_000, subtype="FLOAT"
        )
        with av.open(str(out / f"{number}.mkv"), "w") as container:
            stream = container.add_stream("libx264rgb", rate=25, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = 48, 48, "rgb24"  # type: ignore[union-attr]
            for frame in frames[round(start * 25) : round(stop * 25)]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))  # type: ignore
            container.mux(stream.encode())  # type: ignore[union-attr]
        made.append((out / f"{number}.wav", out / f"{number}.mkv"))
    return made


def test_the_transcript_of_long_audio_is_that_of_its_windows_joined(
    answerer: Answerer, folder: Path, tmp_path: Path
) -> None:
    alone = [answerer.answer(audio=file, budget="audio=/4") for file, _ in cut_files(folder, tmp_path)]
    assert len({answer.text for answer in alone}) > 1
    pieces: list[str] = []
    long = answerer.answer(audio=folder / "long.wav", budget="audio=/4", on_text=pieces.append, timed=True)
    assert long.text == join_transcripts([answer.text for answer in alone], 0.24)
    assert "".join(pieces) == long.text
    assert long.tokens == {"audio": sum(answer.tokens["audio"] for answer in alone)}
    assert long.num_new_tokens == sum(answer.num_new_tokens for answer in alone)
    assert long.timing is not None
    assert long.timing.decode_ms > 0


def test_lips_are_cut_where_their_audio_is(answerer: Answerer, folder: Path) -> None:
    parts = (Media("audio", "long.wav"), Media("video", "long.mp4"), Text("what?"))
    sample = Sample("clip", (Message("user", parts),), "avsr", root=folder)
    windows = load_windows(sample, answerer.processor, CHUNK)
    _, videos = answerer.processor.read_media(sample)
    assert [(window.start, window.stop) for window in windows] == window_times(SECONDS, 1.0, 0.2)
    for window in windows:
        heard, seen = window.media
        assert heard.raw_length == 640 * seen.raw_length
        first = round(window.start * 25)
        expected = answerer.processor.transform(
            "video", dataclasses.replace(videos, frames=videos.frames[first : first + seen.raw_length])
        )
        np.testing.assert_array_equal(seen.values, expected.values)
    assert sum(window.media[1].raw_length for window in windows) > len(videos.frames)
    assert answerer.answer_samples([sample], ["audio=/4,video=/2"])[0].tokens.keys() == {"audio", "video"}


def test_noise_is_mixed_into_the_whole_before_it_is_cut(answerer: Answerer, folder: Path) -> None:
    sample = Sample("a", (Message("user", (Media("audio", "long.wav"),)),), "asr", root=folder)
    noise = Audio(np.random.default_rng(5).normal(0, 0.1, 50_000).astype(np.float32), 16_000)
    (whole,) = answerer.processor.read_media(sample)
    mixed = MixNoise(noise, 0.0)(whole, random_generator(0, 0, "a", "x"))
    rng = random_generator(0, 0, "a", "x")
    windows = load_windows(sample, answerer.processor, CHUNK, noise=lambda audio: MixNoise(noise, 0.0)(audio, rng))
    for window in windows:
        piece = Audio(mixed.samples[round(window.start * 16_000) : round(window.stop * 16_000)], 16_000)
        np.testing.assert_array_equal(window.media[0].values, answerer.processor.transform("audio", piece).values)


def test_long_and_short_audio_answered_together_are_those_answered_alone(answerer: Answerer, folder: Path) -> None:
    names = ["short.wav", "long.wav", "short.wav"]
    parts = [(Media("audio", name), Text(f"what {number}?")) for number, name in enumerate(names)]
    samples = [Sample(str(n), (Message("user", content),), "asr", root=folder) for n, content in enumerate(parts)]
    budgets = ["audio=/4", "audio=/8", "audio=/8"]
    together = answerer.answer_samples(samples, budgets)
    alone = [answerer.answer_samples([one], [at])[0] for one, at in zip(samples, budgets, strict=True)]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together[1].tokens["audio"] > 3 * together[2].tokens["audio"]


def test_long_audio_at_hand_is_cut_as_its_file_is(answerer: Answerer, folder: Path) -> None:
    samples, rate = soundfile.read(folder / "long.wav", dtype="float32")
    data = (folder / "long.wav").read_bytes()
    of_file = answerer.answer(audio=folder / "long.wav", budget="audio=/4")
    array = {"array": samples, "sampling_rate": rate}
    for form in (samples, (samples, rate), array, Audio(samples, rate), data, io.BytesIO(data)):
        answer = answerer.answer(audio=form, budget="audio=/4")
        assert dataclasses.replace(answer, budget=of_file.budget) == of_file, type(form)
    questions = ["what is said?", "who speaks?"]
    both = [answerer.answer_questions(questions, audio=form) for form in (folder / "long.wav", samples)]
    assert both[0] == both[1]
    refusing = Answerer(answerer.model, answerer.processor)
    message = r"^given 1 \(ndarray\): the audio lasts 2\.60 seconds, .* window is 1 seconds; with long_audio chunk"
    with pytest.raises(MediaError, match=message):
        refusing.answer(audio=samples)
    with pytest.raises(MediaError, match=message):
        answerer.processor(text="what is said?", audio=samples)


def test_the_audio_and_the_lips_of_one_clip_at_hand_are_cut_alike(
    answerer: Answerer, folder: Path, tmp_path: Path
) -> None:
    samples, rate = soundfile.read(folder / "long.wav", dtype="float32")
    soundfile.write(tmp_path / "clip.wav", samples, rate, subtype="PCM_16")
    clip = tmp_path / "clip.mkv"
    tiny.write_clip(folder / "long.mp4", tmp_path / "clip.wav", clip)
    of_file = answerer.answer(video=clip, budget="audio=/4,video=/2")
    assert of_file.tokens["video"] == 3 * 12  # of three windows of 25 frames, not of 65
    assert answerer.answer(video=clip.read_bytes(), budget="audio=/4,video=/2") == of_file


def test_an_answer_in_windows_is_cut_where_one_of_them_is(answerer: Answerer, folder: Path) -> None:
    parts = (Media("audio", "long.wav"), Text("what?"))
    sample = Sample("a", (Message("user", parts),), "asr", root=folder)
    windows = load_windows(sample, answerer.processor, CHUNK)
    ((answers,),) = answerer.answer_windows([sample], windows, [[Budget.parse("audio=/4")]])
    ended = [dataclasses.replace(answer, is_cut=False) for answer in answers]
    assert not join_answers(windows, ended).is_cut
    assert join_answers(windows, [*ended[:-1], dataclasses.replace(ended[-1], is_cut=True)]).is_cut


def test_without_chunk_long_audio_is_refused_by_its_name_with_the_option(folder: Path, capsys) -> None:
    path = folder / "long.wav"
    with pytest.raises(MediaError, match=rf"^{re.escape(str(path))}: .* window is 1 seconds; with long_audio chunk"):
        Answerer(*load(folder / "run")).answer(audio=path)
    words = ["generate", "--model", str(folder / "run"), "--audio", str(path), "--max_new_tokens", "8", "--use_cpu"]
    assert main(words) == 2
    assert f"{path}: the audio lasts 2.60 seconds" in capsys.readouterr().err
    assert main([*words, "--long_audio", "chunk", "--overlap_seconds", "0.2", "--budget", "audio=/4"]) == 0
    said = capsys.readouterr().out.strip()
    assert (
        said
        == Answerer(*load(folder / "run"), Decoding(max_new_tokens=8), long_audio=CHUNK)
        .answer(audio=path, budget="audio=/4")
        .text
    )
    assert main([*words, "--overlap_seconds", "0.2"]) == 2
    assert "overlap_seconds is 0.2; it goes with long_audio chunk" in capsys.readouterr().err


@contextlib.contextmanager
def watched(answerer: Answerer) -> Iterator[tuple[list[int], list[int]]]:
    """How many clips each call of the encoder takes, and how many rows each pass of prompts through the LLM has."""
    encoded: list[int] = []
    rows: list[int] = []

    def note(_: object, __: object, kwargs: dict) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            rows.append(len(kwargs["inputs_embeds"]))

    hooks = [
        answerer.model.model.encoder("audio").register_forward_pre_hook(
            lambda _, inputs: encoded.append(len(inputs[0]))
        ),
        answerer.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True),
    ]
    try:
        yield encoded, rows
    finally:
        for hook in hooks:
            hook.remove()


def test_each_window_is_encoded_once_for_all_questions(answerer: Answerer, folder: Path) -> None:
    questions = ["what is said?", "who speaks?"]
    alone = [answerer.answer(text, audio=folder / "long.wav", budget="audio=/4") for text in questions]
    with watched(answerer) as (encoded, _):
        together = answerer.answer_questions(questions, audio=folder / "long.wav", budget="audio=/4")
    assert sum(encoded) == 3
    assert [(one.text, one.tokens) for one in together] == [(one.text, one.tokens) for one in alone]
    parts = [(Media("audio", "long.wav"), Text(text)) for text in questions]
    samples = [Sample(str(n), (Message("user", content),), "asr", root=folder) for n, content in enumerate(parts)]
    budgets = ["audio=/4", "audio=/8"]
    apart = [answerer.answer_samples([one], [at])[0] for one, at in zip(samples, budgets, strict=True)]
    with watched(answerer) as (encoded, rows):
        answers = answerer.answer_samples(samples, budgets)
    assert sum(encoded) == 3
    assert max(rows) <= answerer.batch_size
    assert [(one.text, one.tokens) for one in answers] == [(one.text, one.tokens) for one in apart]


def swept(answerer: Answerer, folder: Path, texts: list[str], out: Path, max_rows: int | None) -> list[dict]:
    """The lines of a sweep of questions about the long audio at two budgets, seen to be what each is alone."""
    questions = [Message("user", (Media("audio", "long.wav"), Text(text))) for text in texts]
    answer = Message("assistant", (Text("place blue"),))
    samples = [Sample(str(number), (question, answer), "asr", root=folder) for number, question in enumerate(questions)]
    budgets = [Budget.parse("audio=/4"), Budget.parse("audio=/8")]
    store = AnswerStore(out)
    store.claim({"model": "tiny"})
    work = plan({"test": samples}, budgets, space=answerer.processor.space)
    Sweep(answerer, store, max_rows=max_rows).run(work)
    return list(store.read().values())


@pytest.mark.parametrize(("max_rows", "batches"), [(None, [6]), (4, [4, 2]), (3, [2] * 3), (1, [1] * 6)])
def test_a_sweep_over_windows_keeps_to_max_rows(
    answerer: Answerer, folder: Path, tmp_path: Path, max_rows: int | None, batches: list[int]
) -> None:
    """Of three windows at two budgets; a pass holds whole windows at all budgets where it can."""
    with watched(answerer) as (_, rows):
        lines = swept(answerer, folder, ["what is said?"], tmp_path, max_rows)
    assert rows == batches
    for line in lines:
        expected = answerer.answer("what is said?", audio=folder / "long.wav", budget=line["budget"])
        assert (line["hypothesis"], line["tokens"]) == (expected.text, expected.tokens)


def test_a_sweep_encodes_each_window_once_for_all_questions_and_budgets(
    answerer: Answerer, folder: Path, tmp_path: Path
) -> None:
    questions = ["what is said?", "who speaks?"]
    with watched(answerer) as (encoded, _):
        lines = swept(answerer, folder, questions, tmp_path, None)
    assert sum(encoded) == 3
    assert len(lines) == 4
    for line in lines:
        expected = answerer.answer(questions[int(line["id"])], audio=folder / "long.wav", budget=line["budget"])
        assert (line["hypothesis"], line["tokens"]) == (expected.text, expected.tokens)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window_seconds": 1.5}, "window_seconds is 1.5; the encoder's window is 1 seconds"),
        ({"overlap_seconds": 0.6}, r"overlap_seconds is 0\.6; it must be at most half a window, 0\.5 seconds"),
    ],
)
def test_windows_the_model_cannot_have_are_refused_before_anything_is_answered(
    answerer: Answerer, folder: Path, tmp_path: Path, capsys, how: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Answerer(answerer.model, answerer.processor, long_audio=LongAudio(mode="chunk", **how))
    message_of = Message("user", (Media("audio", "short.wav"), Text("what?")))
    sample = Sample("a", (message_of, Message("assistant", (Text("place blue"),))), "asr")
    write_manifest(folder / "one.jsonl", [sample])
    options = [f"--{key}={value}" for key, value in how.items()]
    words = ["--model", str(folder / "run"), "--long_audio", "chunk", *options, "--use_cpu"]
    out = ["--manifest", str(folder / "one.jsonl"), "--budgets", "audio=/4", "--out", str(tmp_path / "out")]
    for verb in (["evaluate", *out], ["generate", "--audio", str(folder / "short.wav")]):
        assert main([*verb, *words]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_windows_of_a_model_without_audio_are_refused() -> None:
    config = tiny.settings(("image",))
    with pytest.raises(ValueError, match="long_audio is chunk, but this model does not take audio; it takes image"):
        Answerer(tiny.model(config), tiny.processor(config), long_audio=LongAudio(mode="chunk"))


def test_evaluate_transcribes_long_audio_in_windows(answerer: Answerer, folder: Path, tmp_path: Path) -> None:
    names = {"long": "long.wav", "short": "short.wav"}
    messages = {key: (Media("audio", name), Text("transcribe speech to text.")) for key, name in names.items()}
    answer = Message("assistant", (Text("place blue"),))
    samples = [Sample(key, (Message("user", content), answer), "asr") for key, content in messages.items()]
    write_manifest(folder / "speech.jsonl", samples)
    words = ["evaluate", "--model", str(folder / "run"), "--manifest", str(folder / "speech.jsonl"), "--use_cpu"]
    words += ["--budgets", "audio=/4;audio=/8", "--max_new_tokens", "8", "--out", str(tmp_path)]
    assert main(words) == 1
    assert main([*words, "--long_audio", "chunk", "--overlap_seconds", "0.2", "--out", f"{tmp_path}/chunk"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "chunk" / "hypotheses.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        expected = answerer.answer(audio=folder / names[line["id"]], budget=line["budget"])
        assert line["hypothesis"] == expected.text
        assert line["tokens"] == expected.tokens
        assert line["seconds"] == (SECONDS if line["id"] == "long" else 0.5)
    differences = compare([f"whole={tmp_path}", f"chunked={tmp_path}/chunk"]).differences
    for key, refused, chunked in (("long_audio", "refuse", "chunk"), ("overlap_seconds", "None", "0.2")):
        assert [one for one in differences if key in one and refused in one and chunked in one], differences
    costs = {(line["id"], line["budget"]): line["cost"]["encoder"] for line in lines}
    assert costs["long", "audio=/4"] == 3 * costs["short", "audio=/4"]  # Whisper reads a whole window each time
