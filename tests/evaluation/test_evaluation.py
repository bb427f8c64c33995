"""What an evaluation promises: every sample at every budget exactly once, on any number of ranks, failures named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from answer_lines import assert_same_answers
from PIL import Image

from mllm.budget import Budget
from mllm.config.evaluation import EvaluationConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.answer_store import ANSWERS, HYPOTHESES, AnswerStore
from mllm.evaluation.plot import PLOT
from mllm.evaluation.report import CSV, RESULTS, cut_notes
from mllm.evaluation.run import check_noise, conclude, evaluate_model, run_part
from mllm.evaluation.sweep import Sweep
from mllm.evaluation.work_list import plan
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.decoding import has_no_end
from mllm.media import load_audio

CONFIG = tiny.settings(("image", "audio"))
BUDGETS = [Budget.parse(text) for text in ("image=16,audio=/4", "image=1,audio=/8", "image=4", "audio=/5")]
SECONDS = {"a0": 0.5, "a1": 0.7, "a2": 0.3, "short": 0.13}  # 25, 35, 15 and 6 encoder frames


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(tiny.model(CONFIG, seed=3), tiny.processor(CONFIG), Decoding(max_new_tokens=6), batch_size=3)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Images with questions and utterances; one image is no image, one utterance too short for rate 8."""
    root = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / f"p{number}.png")
    (root / "p9.png").write_bytes(b"not an image at all")
    for name, seconds in SECONDS.items():
        soundfile.write(root / f"{name}.wav", random.normal(0, 0.1, round(16000 * seconds)).astype(np.float32), 16000)
    made = [
        _sample(root, f"p{number}", "image", "what colour?", "red", "vqa", ("colour", "count")[number % 2])
        for number in (0, 1, 2, 3, 9)
    ]
    made += [_sample(root, name, "audio", "transcribe speech to text.", "place blue at f", "asr") for name in SECONDS]
    return made


def _sample(
    root: Path, name: str, medium: str, question: str, answer: str, task: str, kind: str | None = None
) -> Sample:
    media = Media(medium, f"{name}.{'png' if medium == 'image' else 'wav'}")  # type: ignore[arg-type]
    messages = (Message("user", (media, Text(question))), Message("assistant", (Text(answer),)))
    return Sample(name, messages, task, kind, root=root)


def evaluated(answerer: Answerer, samples: list[Sample], output: Path, *, with_plot: bool = False):
    fingerprint = {"model": "tiny"}
    return evaluate_model(
        answerer,
        {"test": samples},
        BUDGETS,
        output=output,
        fingerprint=fingerprint,
        with_plot=with_plot,
        allow_untrained=True,
    )


def test_every_sample_is_answered_at_the_budgets_that_are_for_it(answerer, samples, tmp_path) -> None:
    results = evaluated(answerer, samples, tmp_path, with_plot=True)
    lines = [json.loads(line) for line in (tmp_path / HYPOTHESES).read_text().splitlines()]
    answered = [(line["id"], line["budget"]) for line in lines]
    expected = [(f"p{number}", f"image={count}") for number in (0, 1, 2, 3, 9) for count in (16, 1, 4)]
    expected += [(name, f"audio=/{rate}") for name in SECONDS for rate in (4, 8, 5)]
    assert answered == expected
    answers = {(line["id"], line["budget"]): line for line in lines}
    for name, budget in (("p2", "image=4"), ("a1", "audio=/5")):
        sample = next(sample for sample in samples if sample.id == name)
        alone = answerer.answer_samples([sample], [budget])[0]
        line = answers[name, budget]
        assert line["hypothesis"] == alone.text
        assert line["tokens"] == dict(alone.tokens)
        assert line["prompt_tokens"] == alone.num_prompt_tokens
    assert [answers["a1", f"audio=/{rate}"]["is_trained"] for rate in (4, 8, 5)] == [True, True, False]
    costs = [answers["p0", f"image={count}"]["cost"]["prefill"] for count in (1, 4, 16)]
    assert costs == sorted(costs)
    assert len({(row["task"], row["kind"]) for row in results.rows}) == 4  # vqa: all, colour, count; asr
    assert (tmp_path / PLOT).stat().st_size > 10_000


def test_failures_are_counted_and_named_and_spoil_nothing(answerer, samples, tmp_path) -> None:
    results = evaluated(answerer, samples, tmp_path)
    failed = {(failure["id"], failure["budget"]): failure["error"] for failure in results.failures}
    assert set(failed) == {("p9", "image=16"), ("p9", "image=1"), ("p9", "image=4"), ("short", "audio=/8")}
    assert failed["p9", "image=1"]["kind"] == "unsupported"
    assert "p9.png" in failed["p9", "image=1"]["reason"]
    assert "too short" in failed["short", "audio=/8"]["reason"]
    rows = {(row["task"], row["kind"], row["budget"]): row for row in results.rows}
    assert (rows["vqa", None, "image=4"]["num_samples"], rows["vqa", None, "image=4"]["num_failed"]) == (4, 1)
    assert (rows["asr", None, "audio=/8"]["num_samples"], rows["asr", None, "audio=/8"]["num_failed"]) == (3, 1)
    assert (rows["asr", None, "audio=/5"]["num_samples"], rows["asr", None, "audio=/5"]["num_failed"]) == (4, 0)
    assert rows["asr", None, "audio=/4"]["reference_words"] == 4 * 4


def test_a_conversation_the_template_refuses_is_a_failure_of_its_own(samples, tmp_path) -> None:
    other = Answerer(tiny.model(CONFIG, seed=3), tiny.processor(CONFIG), Decoding(max_new_tokens=6), batch_size=3)
    other.processor.chat.template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    odd = replace(samples[1], messages=(Message("system", (Text("Be kind."),)), *samples[1].messages))
    results = evaluated(other, [samples[0], odd, samples[2], samples[5]], tmp_path)
    assert {failure["id"] for failure in results.failures} == {"p1"}
    for failure in results.failures:
        assert failure["error"]["reason"] == (
            "sample 'p1': the chat template refuses the turns system, user: "
            "Conversation roles must alternate user/assistant"
        )
    (row,) = [one for one in results.rows if (one["kind"], one["budget"]) == (None, "image=4")]
    assert (row["num_samples"], row["num_failed"]) == (2, 1)


def test_what_is_answered_is_not_answered_again_and_failures_are_tried_again(answerer, samples, tmp_path) -> None:
    first = evaluated(answerer, samples, tmp_path)
    calls = []
    handle = answerer.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    second = evaluated(answerer, samples, tmp_path)
    assert not calls
    assert second == first
    # A killed run leaves a line half written; it and what follows are answered again, nothing twice.
    file = tmp_path / ANSWERS / "0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:20])
    third = evaluated(answerer, samples, tmp_path)
    handle.remove()
    assert calls
    assert third == first
    keys = [(line["id"], line["budget"]) for line in map(json.loads, (tmp_path / HYPOTHESES).read_text().splitlines())]
    assert len(keys) == len(set(keys)) == 27


def test_a_file_that_changed_is_asked_about_again_and_no_other(answerer, samples, tmp_path) -> None:
    root = shutil.copytree(samples[0].root, tmp_path / "media")
    moved = [replace(sample, root=root) for sample in (*samples[:2], samples[5])]
    encoded = []
    encoders = answerer.model.model.vision_tower, answerer.model.model.audio_tower
    hooks = [one.register_forward_pre_hook(lambda _, values: encoded.append(len(values[0]))) for one in encoders]
    num_encoded = []
    for source in (None, None, "p3.png"):
        if source is not None:
            shutil.copy(root / source, root / "p1.png")
        encoded.clear()
        evaluated(answerer, moved, tmp_path / "out")
        num_encoded.append(sum(encoded))
    for hook in hooks:
        hook.remove()
    assert num_encoded == [3, 0, 1]
    lines = [json.loads(line) for line in (tmp_path / "out" / HYPOTHESES).read_text().splitlines()]
    now = {(line["id"], line["budget"]): line["hypothesis"] for line in lines}
    (as_p3,) = answerer.answer_samples([replace(samples[3], root=root)], [Budget.parse("image=4")])
    assert now["p1", "image=4"] == as_p3.text
    assert len(lines) == 9


def test_one_encoding_serves_all_budgets_of_a_sample(answerer, samples, tmp_path) -> None:
    encoded = []
    handle = answerer.model.model.vision_tower.register_forward_hook(
        lambda _, inputs, __: encoded.append(len(inputs[0]))
    )
    work = plan({"test": samples[:4]}, BUDGETS[:3], space=answerer.processor.space)
    run_part(Sweep(answerer, _claimed(tmp_path)), work)
    handle.remove()
    assert encoded == [3, 1]  # four images, batches of three, each encoded once for three budgets


@pytest.mark.parametrize(("max_rows", "passes"), [(None, [9, 3]), (6, [6, 6]), (2, [2, 1] * 4)])
def test_no_pass_has_more_rows_than_allowed(answerer, samples, tmp_path, max_rows: int | None, passes: list) -> None:
    work = plan({"test": samples[:4]}, BUDGETS[:3], space=answerer.processor.space)
    rows = []
    first = answerer.model.get_decoder().register_forward_pre_hook(
        lambda _, args, inputs: rows.append(tuple(inputs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    store = _claimed(tmp_path)
    run_part(Sweep(answerer, store, max_rows=max_rows), work)
    first.remove()
    assert [number for number, positions in rows if positions > 1] == passes
    assert len(store.read()) == 12


def test_questions_about_one_image_meet_and_share_its_encoding(answerer, samples, tmp_path) -> None:
    """Wherever they stand in the manifest; the answers are those of each alone, on one rank or two."""
    questions = [
        replace(sample, id=f"{sample.id} {question}", messages=_asking(sample, question))
        for question in ("what colour?", "how many objects are there?", "where is it?")
        for sample in samples[:2]
    ]
    work = plan({"test": questions}, BUDGETS[:3], space=answerer.processor.space)
    seen = {"images": 0}
    handle = answerer.model.model.vision_tower.register_forward_pre_hook(
        lambda _, inputs: seen.update(images=seen["images"] + len(inputs[0]))
    )
    for rank in range(2):
        store = AnswerStore(tmp_path / "shared", rank=rank)
        store.claim({"model": "tiny"})
        run_part(Sweep(answerer, store), work, rank=rank, num_ranks=2)
    handle.remove()
    assert seen["images"] == 2
    lines = AnswerStore(tmp_path / "shared").read().values()
    assert len(lines) == len(questions) * 3
    by_id = {sample.id: sample for sample in questions}
    for line in lines:
        alone = answerer.answer_samples([by_id[line["id"]]], [line["budget"]])[0]
        assert (line["hypothesis"], line["prompt_tokens"]) == (alone.text, alone.num_prompt_tokens)


def _asking(sample: Sample, question: str) -> tuple[Message, ...]:
    image = sample.media[0]
    return (Message("user", (image, Text(question))), *sample.messages[1:])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_number_of_ranks_changes_nothing(answerer, samples, tmp_path, num_ranks: int) -> None:
    alone = evaluated(answerer, samples, tmp_path / "alone")
    work = plan({"test": samples}, BUDGETS, space=answerer.processor.space, allow_untrained=True)
    for rank in range(num_ranks):
        store = AnswerStore(tmp_path / "shared", rank=rank)
        store.claim({"model": "tiny"})
        run_part(Sweep(answerer, store, allow_untrained=True), work, rank=rank, num_ranks=num_ranks)
    shared = conclude(work, AnswerStore(tmp_path / "shared"), seed=0, facts=alone.facts, with_plot=False)
    assert shared == alone
    for name in (RESULTS, CSV):
        assert (tmp_path / "shared" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert_same_answers(*(tmp_path / name / HYPOTHESES for name in ("shared", "alone")))
    # Another number of ranks goes on where these stopped.
    done = []
    again = Sweep(answerer, AnswerStore(tmp_path / "shared"), allow_untrained=True)
    run_part(again, work, progress=lambda *counts: done.append(counts))
    assert done[-1] == (27, 27)


def test_answers_that_had_not_ended_are_counted(answerer, samples, tmp_path, monkeypatch) -> None:
    """An answer has not ended where there is no end in the tokens that are allowed."""
    model, chosen, said = answerer.model, samples[:3], []
    generate = model.generate

    def listening(**kwargs):
        output = generate(**kwargs)
        said.extend(output.sequences[:, kwargs["input_ids"].shape[1] :].tolist())
        return output

    monkeypatch.setattr(model, "generate", listening)

    def lines_of(name: str):
        facts = {"model": "tiny", "max_new_tokens": 6}
        sets = {"test": chosen}
        results = evaluate_model(
            answerer, sets, BUDGETS[:2], output=tmp_path / name, fingerprint=facts, with_plot=False
        )
        return results, AnswerStore(tmp_path / name).read().values()

    results, lines = lines_of("cut")
    assert [line["new_tokens"] for line in lines] == [len(ids) for ids in said] == [6] * 6
    assert all(line["is_cut"] for line in lines)
    note = "6 answers to test (vqa) were cut at max_new_tokens 6: 3 at image=16, 3 at image=1"
    assert cut_notes(results.rows, 6) == [note]
    end = min((ids[-1] for ids in said), key=lambda token: sum(token in ids for ids in said))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    before = list(said)
    results, lines = lines_of("ended")
    assert [line["is_cut"] for line in lines] == [end not in ids for ids in before]
    num_cut = sum(end not in ids for ids in before)
    assert num_cut < 6
    assert sum(row["num_cut"] for row in results.rows if row["kind"] is None) == num_cut
    assert (has_no_end([1, end], [end]), has_no_end([end, 1], [end])) == (False, True)


def test_a_rank_that_ended_early_is_noticed(answerer, samples, tmp_path) -> None:
    work = plan({"test": samples}, BUDGETS, space=answerer.processor.space, allow_untrained=True)
    store = _claimed(tmp_path)
    run_part(Sweep(answerer, store, allow_untrained=True), work, rank=1, num_ranks=2)
    with pytest.raises(RuntimeError, match="answers are missing, the first is Key"):
        conclude(work, store, seed=0)


def test_answers_of_another_model_are_refused(answerer, samples, tmp_path) -> None:
    store = _claimed(tmp_path)
    store.claim({"model": "tiny"})
    with pytest.raises(ValueError, match="model was 'tiny' and is 'other'"):
        store.claim({"model": "other"})


def test_noise_is_a_function_of_seed_sample_and_ratio(answerer, samples, tmp_path) -> None:
    spoken = [sample for sample in samples if sample.task == "asr"][:2]
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(1).normal(0, 0.1, 8000).astype(np.float32), 16000)
    noise = load_audio(tmp_path / "noise.wav")
    work = plan({"test": spoken}, BUDGETS[:1], space=answerer.processor.space, snrs_db=[None, 0.0, -5.0])
    assert [(item.sample.id, item.snr_db) for item in work[:3]] == [("a0", None), ("a0", 0.0), ("a0", -5.0)]
    media = [
        Sweep(answerer, _claimed(tmp_path), noise=noise, seed=seed)._load(work[1])[0].media[0].values
        for seed in (0, 0, 1)
    ]
    assert media[0].equal(media[1])
    assert not media[0].equal(media[2])
    run_part(Sweep(answerer, _claimed(tmp_path), noise=noise), work)
    results = conclude(work, AnswerStore(tmp_path), seed=0, with_plot=False)
    assert [row["snr_db"] for row in results.rows] == [None, 0.0, -5.0]
    assert {row["num_samples"] for row in results.rows} == {2}


def test_the_noise_of_training_is_refused_for_testing(tmp_path) -> None:
    (tmp_path / "train.wav").write_bytes(b"a recording")
    (tmp_path / "copy.wav").write_bytes(b"a recording")
    (tmp_path / "other.wav").write_bytes(b"another")
    (tmp_path / "settings.yaml").write_text(f"data:\n  noise: {tmp_path}/train.wav\n")

    def settings(noise: str, **changes) -> EvaluationConfig:
        path = str(tmp_path / noise)
        return EvaluationConfig(
            model=str(tmp_path), manifest=["m.jsonl"], budgets="audio=/4", noise=path, snr_db=[0.0], **changes
        )

    check_noise(settings("other.wav"))
    for same in ("train.wav", "copy.wav"):
        with pytest.raises(ValueError, match=r"is what the model was trained with .* allow_training_noise"):
            check_noise(settings(same))
        check_noise(settings(same, allow_training_noise=True))


def test_what_cannot_be_evaluated_is_refused_before_anything_runs(answerer, samples) -> None:
    space = answerer.processor.space
    image, audio = samples[0], samples[-1]
    cases = [
        ([replace(image, task="caption")], "image=1", "no metric for task 'caption'; allowed: asr, vsr, avsr, vqa"),
        ([image], "audio=/4", "'p0' of test holds image, which none of the budgets names"),
        ([image], "image=1;audio=/4", "budget 'audio=/4' is for no sample"),
        ([image], "video=/2", "names video; this model takes image, audio"),
        ([replace(image, meta={"answers": ["a", "b"]})], "image=1", "2 answers are too few"),
        ([replace(image, meta={"answers": "red"})], "image=1", "must be a list of texts"),
        ([replace(audio, meta={"answers": ["a", "b"]})], "audio=/4", "task asr needs one answer, got 2"),
        ([replace(image, messages=image.messages[:1])], "image=1", "no answer to compare with"),
    ]
    for chosen, budgets, message in cases:
        with pytest.raises(ValueError, match=message):
            plan({"test": chosen}, [Budget.parse(text) for text in budgets.split(";")], space=space)


def _claimed(folder: Path) -> AnswerStore:
    store = AnswerStore(folder)
    store.claim({"model": "tiny"})
    return store
