"""What a run finds out about its samples before it starts: tokens, targets, and what stops it."""

import copy
import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers.normalizers import Lowercase

from mllm.budget import Budget
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.processing.processor import LoadedMedia
from mllm.training.pipeline import token_scan as module
from mllm.training.pipeline.loaders import encode, media_groups
from mllm.training.pipeline.token_scan import check_targets, count_targets, evenly_sampled, scan_tokens, target_report

GOOD = Sample("good", (Message("user", (Text("hi"),)), Message("assistant", (Text("hello"),))), task="test")
IMAGE = Media("image", "a.png")


@pytest.fixture(scope="module")
def processor():
    return tiny.processor(tiny.settings(("image",)))


def mixed(num_good: int, num_empty: int) -> list[Sample]:
    """Samples of which some are a question alone."""
    empty = [dataclasses.replace(GOOD, id=f"e{number}", messages=GOOD.messages[:1]) for number in range(num_empty)]
    return [*[GOOD] * num_good, *empty]


def test_too_many_samples_with_nothing_to_learn_stop_the_run(processor) -> None:
    samples = mixed(98, 2)
    limits = {"tokens_per_batch": 100, "max_unsupervised_fraction": 0.01}
    with pytest.raises(ValueError, match=r"2 of 100 samples have nothing to learn .* such as 'e0', 'e1'; .* 0.01"):
        scan_tokens(samples, processor).check(samples, **limits)
    scan_tokens(samples, processor).check(samples, **{**limits, "max_unsupervised_fraction": 0.02})
    scan_tokens(mixed(199, 2), processor).check(mixed(199, 2), **limits)


def test_the_report_says_how_many_targets_and_who_has_none(processor, caplog: pytest.LogCaptureFixture) -> None:
    samples = mixed(5, 7)
    caplog.set_level(logging.INFO)
    scan_tokens(samples, processor).check(samples, tokens_per_batch=100, max_unsupervised_fraction=0.9)
    line = "12 samples; target tokens per sample: least 0, median 0, mean 1.7, most 4; 7 without"
    assert f"{line} ('e0', 'e1', 'e2', 'e3', 'e4' and 2 more)" in caplog.text
    assert "samples per second" in caplog.text
    assert target_report(["a"], [3]).endswith("0 without")


def test_a_large_data_set_is_stopped_at_the_first_scan(
    processor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FIRST_SCAN", 50)
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match=r"\d+ of 50 samples have nothing to learn"):
        scan_tokens(mixed(150, 150), processor, max_unsupervised_fraction=0.01)
    assert "first scan: 50 samples" in caplog.text
    assert "samples per second" not in caplog.text


def test_what_is_drawn_is_always_the_same_and_spread() -> None:
    assert evenly_sampled(5, 10) == [0, 1, 2, 3, 4]
    first = evenly_sampled(1000, 100)
    assert first == evenly_sampled(1000, 100) == sorted(set(first))
    assert len(first) == 100
    assert max(first) > 900


def test_a_sample_the_format_has_no_place_for_is_named(processor) -> None:
    bad = dataclasses.replace(GOOD, id="bad", messages=(Message("user", (Media("audio", "a.wav"),)), GOOD.messages[1]))
    with pytest.raises(ValueError, match="sample 'bad': this model does not take audio"):
        scan_tokens([GOOD, bad], processor)


def test_a_cut_sample_has_the_tokens_and_targets_that_a_batch_has(processor) -> None:
    """The scan and the batch agree on what is left, wherever the cut is."""
    messages = (
        *(Message("user", (IMAGE, Text("what is it?"))), Message("assistant", (Text("a red circle"),))),
        *(Message("user", (Text("sure?"),)), Message("assistant", (Text("yes it is a red circle"),))),
    )
    sample = Sample("long", messages, task="test")
    image: LoadedMedia = tiny.random_media("image")
    whole = scan_tokens([sample], processor)
    for limit in range(66, whole.max_tokens[0] + 2):
        scan = scan_tokens([sample], processor, max_sample_tokens=limit)
        row = encode([sample], [[image]], processor=processor, budgets=[], max_sample_tokens=limit)["batch"].rows[0]
        assert scan.max_tokens[0] == min(limit, whole.max_tokens[0]) == len(row.ids) - 1 + 64
        assert scan.num_targets[0] == sum(label != -100 for label in row.labels)
        assert len(row.ids) == len(row.labels)
    assert scan_tokens([sample], processor, max_sample_tokens=66).num_targets == [0]


def test_a_image_behind_the_cut_is_refused_not_cut(processor) -> None:
    messages = (
        *(Message("user", (Text("hi"),)), Message("assistant", (Text("hello"),))),
        *(Message("user", (IMAGE,)), Message("assistant", (Text("red"),))),
    )
    sample = Sample("late", messages, task="test")
    with pytest.raises(ValueError, match=r"sample 'late': a medium lies behind data.max_sample_tokens 20"):
        encode([sample], [[tiny.random_media("image")]], processor=processor, budgets=[Budget()], max_sample_tokens=20)


def test_samples_are_grouped_by_their_media() -> None:
    image = dataclasses.replace(GOOD, messages=(Message("user", (IMAGE, IMAGE)), GOOD.messages[1]))
    assert media_groups([GOOD, image, GOOD]) == [0, 1, 0]


def test_conversations_are_counted_as_they_are_encoded_also_over_several_calls(
    processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    samples = [
        dataclasses.replace(
            GOOD,
            id=str(number),
            messages=(GOOD.messages[0], Message("assistant", (Text("a cat " * (number % 5 + 1)),))),
        )
        for number in range(40)
    ]
    encoded = [processor.chat(sample.messages) for sample in samples]
    assert count_targets(samples, processor.chat) == [
        (sample.id, sum(label != -100 for label in prompt.labels))
        for sample, prompt in zip(samples, encoded, strict=True)
    ]
    scan = scan_tokens(samples, processor)
    assert scan.max_tokens == [len(prompt.ids) for prompt in encoded]
    check_targets([sample.id for sample in samples], scan.num_targets, 0.0)


def numbered(count: int) -> list[Sample]:
    """Samples of different lengths."""
    answers = [Message("assistant", (Text("a cat " * (number % 5 + 1)),)) for number in range(count)]
    return [
        dataclasses.replace(GOOD, id=str(number), messages=(GOOD.messages[0], answer))
        for number, answer in enumerate(answers)
    ]


def test_processes_count_what_one_counts_and_say_how_far_they_are(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 8)
    samples = numbered(45)
    samples[20] = dataclasses.replace(samples[20], messages=samples[20].messages[:1])
    monkeypatch.setattr(module, "MIN_PARTS", 100)
    alone, seen = scan_tokens(samples, processor, processes=2), []
    monkeypatch.setattr(module, "MIN_PARTS", 4)
    monkeypatch.setattr(module, "measure_samples", in_a_process_of_its_own(module.measure_samples))
    assert scan_tokens(samples, processor, processes=2, progress=lambda *done: seen.append(done)) == alone
    assert seen == [(8, 45), (16, 45), (24, 45), (32, 45), (40, 45), (45, 45)]
    bad = dataclasses.replace(GOOD, id="bad", messages=(Message("user", (Media("audio", "a.wav"),)), GOOD.messages[1]))
    with pytest.raises(ValueError, match=r"sample 'bad'.*audio"):
        scan_tokens([*samples, bad], processor, processes=2)


def in_a_process_of_its_own(measure: Callable[..., Any]) -> Callable[..., Any]:
    """What measures samples, and fails in the process that made it."""
    here = os.getpid()

    def measured(*arguments: Any) -> Any:
        assert os.getpid() != here
        return measure(*arguments)

    return measured


def test_a_scan_is_kept_until_a_file_the_tokenizer_or_its_template_changes(tmp_path: Path) -> None:
    settings = tiny.settings(("audio",))
    name = tiny.write_media(tmp_path, seconds=0.8)["audio"]
    heard = (Message("user", (Media("audio", name),)), GOOD.messages[1])
    samples = [dataclasses.replace(GOOD, messages=heard, root=tmp_path)]

    def scanned(tokenizer: Any = tiny.TOKENIZER) -> int:
        processor = tiny.processor(settings, tokenizer=tokenizer)
        return scan_tokens(samples, processor, cache_file=tmp_path / "kept.json").max_tokens[0]

    before = scanned()
    kept = tmp_path / "kept.json"
    kept.write_text(kept.read_text().replace(f"[{before}]", "[1000]", 1))
    assert scanned() == 1000  # read, not made again
    tiny.write_media(tmp_path, seconds=0.4)
    assert scanned() == before - 5  # 20 frames less, at /4
    kept.write_text(kept.read_text().replace(f"[{before - 5}]", "[1000]", 1))
    other = copy.deepcopy(tiny.TOKENIZER)
    other.backend_tokenizer.normalizer = Lowercase()
    assert len(other) == len(tiny.TOKENIZER)
    assert scanned() == 1000
    assert scanned(other) < 1000


def test_a_scan_is_made_anew_where_the_tar_changes_that_a_medium_stands_in(tmp_path: Path) -> None:
    content = bytearray((tmp_path / tiny.write_media(tmp_path, seconds=0.8)["audio"]).read_bytes())
    (tmp_path / "a.tar").write_bytes(bytes(512) + content)
    heard = (Message("user", (Media("audio", f"a.tar@512.{len(content)}"),)), GOOD.messages[1])
    samples = [dataclasses.replace(GOOD, messages=heard, root=tmp_path)]
    processor = tiny.processor(tiny.settings(("audio",)))
    [before] = scan_tokens(samples, processor, cache_file=tmp_path / "kept.json").max_tokens
    rate_hz = int.from_bytes(content[24:28], "little")
    content[24:28] = (2 * rate_hz).to_bytes(4, "little")  # half as long, of as many bytes
    (tmp_path / "a.tar").write_bytes(bytes(512) + content)
    [after] = scan_tokens(samples, processor, cache_file=tmp_path / "kept.json").max_tokens
    assert after == before - 5  # 20 frames less, at /4


def test_refused_conversations_are_kept_apart_and_stop_a_run_only_when_they_are_many(
    processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    templated = tiny.processor(tiny.settings(("image",)))
    templated.chat.template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ 1 / 0 }}{% endif %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    odd = dataclasses.replace(GOOD, messages=(Message("system", (Text("Be kind."),)), *GOOD.messages))
    samples = [dataclasses.replace(GOOD, id=f"g{number}") for number in range(10)]
    samples[3:3] = [dataclasses.replace(odd, id="odd")]
    scan = scan_tokens(samples, templated, cache_file=tmp_path / "kept.json")
    assert scan.refused == {"odd": "the chat template refuses the turns system, user, assistant: division by zero"}
    alone = scan_tokens(samples[:1], templated)
    assert [tokens for number, tokens in enumerate(scan.max_tokens) if number != 3] == alone.max_tokens * 10
    assert scan_tokens(samples, templated, cache_file=tmp_path / "kept.json") == scan  # as it was kept
    limits = {"tokens_per_batch": 100, "max_unsupervised_fraction": 0.0}
    caplog.set_level(logging.INFO)
    scan.check(samples, **limits, max_bad_fraction=0.01)
    assert "11 samples; target" not in caplog.text
    assert "10 samples; target" in caplog.text
    assert scan.without_refused(samples) == (
        [*samples[:3], *samples[4:]],
        scan_tokens([*samples[:3], *samples[4:]], templated),
    )
    with pytest.raises(ValueError, match=r"1 of 11 samples are refused; data.max_bad_fraction allows 0 of them"):
        scan.check(samples, **limits)
    many = [dataclasses.replace(odd, id=f"o{number}") for number in range(6)]
    mostly_good = [*samples[:1] * 500, *many]
    with pytest.raises(ValueError, match=r"6 of 506 samples are refused"):
        scan_tokens(mostly_good, templated).check(mostly_good, **limits, max_bad_fraction=0.01)
