"""LLaVA JSON: markers are pictures in their places; what does not match is refused by id."""

import json
from pathlib import Path

import pytest

from mllm.data.llava import read_llava
from mllm.data.manifest import Media, Text, read_manifest, write_manifest


def written(folder: Path, *entries: object) -> Path:
    """A LLaVA file of entries."""
    (folder / "llava.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "llava.json"


def entry(*values: str, image: object = "a.jpg", **keys: object) -> dict:
    """A conversation of turns, human first."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": "7", "conversations": turns} | ({} if image is None else {"image": image}) | keys


def test_markers_are_the_places_of_the_pictures(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        entry("<image>\nWhat?", "A cat.", "Sure?", "Yes."),
        entry("First <image> then <image><image>", "ok", image=["1.jpg", "2.jpg", "3.jpg"], id="8"),
        entry("No picture.", "Fine.", image=None, id=9),
    )
    first, second, third = read_llava(path, tmp_path)
    assert [message.role for message in first.messages] == ["user", "assistant", "user", "assistant"]
    assert first.messages[0].parts == (Media("image", "a.jpg"), Text("\nWhat?"))
    assert second.messages[0].parts == (
        *(Text("First "), Media("image", "1.jpg"), Text(" then ")),
        *(Media("image", "2.jpg"), Media("image", "3.jpg")),
    )
    assert third.media == ()
    assert [sample.id for sample in (first, second, third)] == ["7", "8", "9"]
    assert {sample.task for sample in (first, second, third)} == {"vqa"}


def test_it_becomes_a_manifest(tmp_path: Path) -> None:
    samples = read_llava(written(tmp_path, entry("<image>", "x")), tmp_path, task="caption", kind="short")
    assert (samples[0].task, samples[0].kind) == ("caption", "short")
    write_manifest(tmp_path / "m.jsonl", samples)
    assert read_manifest(tmp_path / "m.jsonl", tmp_path) == samples


def test_ids_that_occur_again_are_numbered(tmp_path: Path) -> None:
    path = written(tmp_path, *[entry("<image>", "x") for _ in range(3)])
    assert [sample.id for sample in read_llava(path, tmp_path)] == ["7", "7#2", "7#3"]
    with pytest.raises(ValueError, match="'7#2' is needed for a second sample '7', but it is taken"):
        read_llava(written(tmp_path, entry("x", "y", image=None, id="7#2"), *[entry("<image>", "x")] * 2), tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("What?", "x"), r"\(id '7'\): 0 <image> markers for 1 pictures"),
        (entry("<image> <image>", "x"), r"\(id '7'\): 2 <image> markers for 1 pictures"),
        (entry("<image>", "x", image=None), r"\(id '7'\): 1 <image> markers for 0 pictures"),
        (entry("<image>", "an <image>"), "may stand only in what a human says"),
        (entry("<image>", "x", image="../a.jpg"), "path must not hold '..'"),
        (entry("<image>", "x", image=[3]), "must be a string, got a number"),
        (entry("<image>"), "the last message must be the assistant's"),
        (entry("<image>", ""), "must not be empty"),
        (entry("<image>", "x", video="a.mp4"), "unknown keys video; allowed are id, image, conversations"),
        ({"id": "7", "conversations": [{"from": "bot", "value": "x"}]}, "from must be one of human, gpt, system"),
        ({"id": "7", "conversations": [{"from": "gpt"}]}, "value must be a string, got None"),
        ({"id": "7", "conversations": "x"}, "conversations must be a list of objects"),
        ({"id": "7"}, "conversations must be a list of objects"),
        ("x", "entry 1: must be an object, got str"),
        ({**entry("<image>", "x"), "id": ""}, "id: must not be empty"),
    ],
)
def test_what_does_not_match_is_refused_by_entry_and_id(tmp_path: Path, bad: object, message: str) -> None:
    path = written(tmp_path, entry("<image>", "x", id="good"), bad)
    with pytest.raises(ValueError, match=message) as caught:
        read_llava(path, tmp_path)
    assert "llava.json: entry 1" in str(caught.value)


def test_files_that_are_no_llava_json(tmp_path: Path) -> None:
    for text, message in [("{", "not a JSON file"), ("{}", "must be a list"), ("[]", "at least one conversation")]:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_llava(tmp_path / "x.json", tmp_path)
