"""LLaVA JSON: markers are images in their places; what does not match is refused by id."""

import json
from pathlib import Path

import pytest

from mllm.data.llava import read_llava
from mllm.data.manifest import Media, Text, read_manifest, write_manifest


def written(folder: Path, *entries: object) -> Path:
    """Write a LLaVA file of entries."""
    (folder / "llava.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "llava.json"


def entry(*values: str, image: object = "a.jpg", **keys: object) -> dict:
    """Return a conversation of turns, human first."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": "7", "conversations": turns} | ({} if image is None else {"image": image}) | keys


def test_markers_are_the_places_of_the_images(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        entry("<image>\nWhat?", "A cat.", "Sure?", "Yes."),
        entry("First <image> then <image><image>", "ok", image=["1.jpg", "2.jpg", "3.jpg"], id="8"),
        entry("No image.", "Fine.", image=None, id=9),
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
        (entry("What?", "x"), r"\(id '7'\): 0 <image> markers for 1 images"),
        (entry("<image> <image>", "x"), r"\(id '7'\): 2 <image> markers for 1 images"),
        (entry("<image>", "x", image=None), r"\(id '7'\): 1 <image> markers for 0 images"),
        (entry("<image>", "an <image>"), "may stand only in what a human says"),
        (entry("<image>", "x", image="../a.jpg"), "path must not hold '..'"),
        (entry("<image>", "x", image=[3]), "must be a string, got a number"),
        (entry("What?\n<image>", "x", image=None), r"\(id '7'\): 1 <image> markers for 0 images"),
        (
            entry("<image>", "x", video="a.mp4"),
            "video: format llava reads images under image; format sharegpt reads video",
        ),
        ({"id": "7", "conversations": [{"from": "bot", "value": "x"}]}, "from must be one of human, gpt, system"),
        ({"id": "7", "conversations": [{"from": "gpt"}]}, "value must be a string, got None"),
        ({"id": "7", "conversations": "x"}, "conversations must be a list of objects"),
        ({"id": "7"}, "conversations must be a list of objects"),
        ("x", "entry 1: must be an object, got a string"),
        ({**entry("<image>", "x"), "id": ""}, "id: must not be empty"),
    ],
)
def test_what_does_not_match_is_refused_by_entry_and_id(tmp_path: Path, bad: object, message: str) -> None:
    path = written(tmp_path, entry("<image>", "x", id="good"), bad)
    with pytest.raises(ValueError, match=message) as caught:
        read_llava(path, tmp_path)
    assert "llava.json: entry 1" in str(caught.value)


def test_files_that_are_no_llava_json(tmp_path: Path) -> None:
    for text, message in [
        ("[{", "not a JSON file"),
        ("{", "x.json:1: not JSON"),
        ("{}", "conversations must be a list"),
        ("[]", "at least one conversation"),
    ]:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_llava(tmp_path / "x.json", tmp_path)


def mix665k(*turns: tuple[str, str], image: str | None, id: str = "000000033471", **keys: object) -> dict:
    """Return an entry with its keys in the order of llava_v1_5_mix665k.json; speakers are given."""
    one = {"id": id} | ({} if image is None else {"image": image})
    return one | {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]} | keys


MIXTURE = [
    mix665k(
        ("human", "<image>\nWhat are the colors of the bus in the image?"),
        ("gpt", "The bus in the image is white and red."),
        ("human", "What feature can be seen on the back of the bus?"),
        ("gpt", "The back of the bus features an advertisement."),
        image="coco/train2017/000000033471.jpg",
    ),
    mix665k(
        ("human", "Who wrote this book?\nAnswer the question using a single word or phrase.\n<image>"),
        ("gpt", "Brand: Mead"),
        image="ocr_vqa/images/140031996X.jpg",
        id="ocr_vqa/140031996X",
    ),
    mix665k(("human", "<image>\nIs it?"), ("gpt", "Yes"), image="gqa/images/2354786.jpg", id="gqa/2354786"),
    mix665k(("human", "<image>\nBrand?"), ("gpt", "Nokia"), image="textvqa/train_images/0054.jpg", id="textvqa/0054"),
    mix665k(("human", "<image>\nWhere?"), ("gpt", "[0.1, 0.2]"), image="vg/VG_100K_2/2404.jpg", id="VG_100K_2/2404"),
    mix665k(
        ("human", "Write SVG with an <image> in it."),
        ("gpt", "<svg><image></svg>"),
        image=None,
        id="wgByO4Y_0",
        model="",
    ),
]


def test_the_forms_that_occur_in_llavas_mixture(tmp_path: Path) -> None:
    samples = read_llava(written(tmp_path, *MIXTURE), tmp_path)
    assert [sample.media[0].path.split("/")[0] for sample in samples[:5]] == ["coco", "ocr_vqa", "gqa", "textvqa", "vg"]
    assert [len(sample.messages) for sample in samples] == [4, 2, 2, 2, 2, 2]
    assert [type(part) for part in samples[1].messages[0].parts] == [Text, Media]
    assert samples[5].media == ()
    assert [message.text for message in samples[5].messages] == [
        "Write SVG with an <image> in it.",
        "<svg><image></svg>",
    ]
    write_manifest(tmp_path / "m.jsonl", samples)
    assert read_manifest(tmp_path / "m.jsonl", tmp_path) == samples


def test_images_first_is_where_llavas_training_code_puts_them(tmp_path: Path) -> None:
    first, second, *_, text_only = read_llava(written(tmp_path, *MIXTURE), tmp_path, images_first=True)
    assert first.messages[0].parts[1] == Text("\nWhat are the colors of the bus in the image?")
    question = "\nWho wrote this book?\nAnswer the question using a single word or phrase."
    assert second.messages[0].parts == (Media("image", "ocr_vqa/images/140031996X.jpg"), Text(question))
    assert first.messages[2].text == "What feature can be seen on the back of the bus?"
    assert "<image>" in text_only.messages[0].text
    two = entry(" one <image> two <image> ", "x", image=["1.jpg", "2.jpg"])
    parts = read_llava(written(tmp_path, two), tmp_path, images_first=True)[0].messages[0].parts
    assert parts == (Media("image", "1.jpg"), Text("\n"), Media("image", "2.jpg"), Text("\none  two"))
    alone = read_llava(written(tmp_path, entry("<image>\n", "x")), tmp_path, images_first=True)[0]
    assert alone.messages[0].parts == (Media("image", "a.jpg"),)


def test_pretraining_pairs_are_read(tmp_path: Path) -> None:
    pair = mix665k(
        ("human", "Render a clear and concise summary of the photo.\n<image>"),
        ("gpt", "select luxury furniture 3 - inch gel memory foam mattress topper"),
        image="00453/004539375.jpg",
        id="004539375",
    )
    sample = read_llava(written(tmp_path, pair), tmp_path)[0]
    assert (sample.id, sample.media[0].path) == ("004539375", "00453/004539375.jpg")


@pytest.mark.parametrize(
    ("turns", "kept", "reported"),
    [
        ([("gpt", "Hi!"), ("human", "What?"), ("gpt", "A cat.")], ["What?", "A cat."], "1 answers without a question"),
        (
            [("human", "What?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", " ")],
            ["What?", "A cat."],
            "1 questions without an answer",
        ),
        ([("human", "What?"), ("gpt", "A cat."), ("human", "Sure?")], ["What?", "A cat."], "1 questions without"),
        (
            [("human", "What?"), ("gpt", "A cat."), ("human", ""), ("gpt", "Yes.")],
            ["What?", "A cat."],
            "1 answers without a question",
        ),
        (
            [("system", "Be kind."), ("gpt", "Hi!"), ("human", "What?"), ("gpt", "x")],
            ["Be kind.", "What?", "x"],
            "1 answers",
        ),
        ([("human", "What?"), ("gpt", "")], None, "1 samples without a question that has an answer"),
    ],
    ids=["answer first", "empty answer", "no last answer", "empty question", "answer after system", "nothing"],
)
def test_what_has_no_question_or_answer_is_left_out_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, turns: list, kept: list[str] | None, reported: str
) -> None:
    samples = read_llava(written(tmp_path, mix665k(*turns, image=None), entry("x", "y", image=None)), tmp_path)
    assert len(samples) == (2 if kept else 1)
    if kept:
        assert [message.text for message in samples[0].messages] == kept
    assert reported in caplog.text


def test_a_sample_whose_image_belongs_to_what_is_left_out_is_left_out_whole(tmp_path: Path) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", ""), ("human", "Sure?"), ("gpt", "Yes.")]
    good = entry("x", "y", image=None)
    assert len(read_llava(written(tmp_path, mix665k(*turns, image="a.jpg"), good), tmp_path)) == 1


def test_every_bad_entry_is_named_up_to_twenty(tmp_path: Path) -> None:
    path = written(tmp_path, *[entry("What?", "x", id=str(number)) for number in range(22)])
    with pytest.raises(ValueError, match="and 2 more") as caught:
        read_llava(path, tmp_path)
    assert str(caught.value).count("0 <image> markers for 1 images") == 20
