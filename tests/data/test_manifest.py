"""The manifest is read exactly or refused with file, line and key; hostile files never get further than that."""

import json
import random
from pathlib import Path

import pytest

from mllm.data.json_lines import MAX_LINE_BYTES
from mllm.data.manifest import (
    Media,
    Message,
    Sample,
    Text,
    parse_row,
    read_manifest,
    scan_manifest,
    write_manifest,
)

GOOD = {
    "id": "a",
    "task": "vqa",
    "messages": [
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ],
}


def changed(*path, **keys) -> dict:
    """Return the good row with the object at a path changed; a value of ... removes its key."""
    row = json.loads(json.dumps(GOOD))
    index = row
    for step in path:
        index = index[step]
    for key, value in keys.items():
        if value is ...:
            del index[key]
        else:
            index[key] = value
    return row


def manifest(folder: Path, *lines: bytes | dict) -> Path:
    """Write a manifest of raw lines and rows."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    (folder / "m.jsonl").write_bytes(b"".join(raw))
    return folder / "m.jsonl"


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    samples = [
        Sample(
            f'id {number}, "quoted"\u2028\x85',
            (
                Message("system", (Text("Be brief.\r\n"),)),
                Message("user", (Text("<image> "), Media("image", "a/ü b.png"), Media("audio", "b.wav"), Text(""))),
                Message("assistant", (Text("yes, no; \N{GRINNING FACE}"),)),
            ),
            "vqa",
            kind="count" if number else None,
            meta={"snr": 0.5, "tags": [1, None]} if number else {},
            root=tmp_path,
        )
        for number in range(3)
    ]
    write_manifest(tmp_path / "m.jsonl", samples)
    assert read_manifest(tmp_path / "m.jsonl", tmp_path) == samples
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_plain_string_is_one_text_and_order_is_kept(tmp_path: Path) -> None:
    sample = parse_row(GOOD, tmp_path)
    assert sample.messages[1].parts == (Text("A cat."),)
    assert sample.messages[0].parts == (Media("image", "a.png"), Text("What?"))
    assert sample.messages[0].text == "What?"
    assert sample.media == (Media("image", "a.png"),)
    assert (sample.kind, sample.meta, sample.root) == (None, {}, tmp_path)
    assert hash(sample) == hash(parse_row(GOOD, tmp_path))


def test_byte_order_mark_line_ends_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    rows = [json.dumps(changed(id=name)).encode() for name in "abc"]
    path = manifest(tmp_path, b"\xef\xbb\xbf" + rows[0] + b"\r\n", b"\r\n", b"  \n", rows[1] + b"\n", rows[2])
    assert [row.line_number for row in scan_manifest(path, tmp_path)] == [1, 4, 5]
    assert [sample.id for sample in read_manifest(path, tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(id=...), "id: is missing"),
        (changed(id=""), "id: must not be empty"),
        (changed(id=7), "id: must be a string, got a number"),
        (changed(id="a\0b"), "id: must not hold the character NUL"),
        (changed(task=...), "task: is missing"),
        (changed(task=None), "task: must be a string, got null"),
        (changed(kind=3.5), "kind: must be a string, got a number"),
        (changed(meta=[1]), "meta: must be an object, got a list"),
        (changed(label="x"), "label: unknown key; allowed are id, messages, task, kind, meta"),
        (changed(messages=...), "messages: is missing"),
        (changed(messages=[]), "messages: must be a list of at least one message, got a list that is empty"),
        (changed(messages="hi"), "messages: must be a list of at least one message, got a string"),
        (changed(messages=GOOD["messages"][:1]), "messages: the last message must be the assistant's, got role 'user'"),
        (changed(messages=["hi"]), "messages[0]: must be an object, got a string"),
        (changed("messages", 0, role="human"), "messages[0].role: must be one of system, user, assistant, got 'human'"),
        (changed("messages", 0, role=[]), "messages[0].role: must be one of system, user, assistant, got []"),
        (changed("messages", 1, role="system"), "messages[1].role: only the first message may be the system's"),
        (changed("messages", 0, name="x"), "messages[0].name: unknown key; allowed are role, content"),
        (changed("messages", 0, content=...), "messages[0].content: is missing"),
        (changed("messages", 0, content=[]), "messages[0].content: must be a string or a list of at least one part"),
        (changed("messages", 0, content={"a": 1}), "messages[0].content: must be a string or a list"),
        (changed("messages", 1, content=" "), "messages[1].content: must not be empty"),
        (
            changed("messages", 1, content=[{"type": "text", "text": "\n"}]),
            "messages[1].content: the assistant's answer must not be empty",
        ),
        (changed("messages", 0, "content", 0, type="picture"), "content[0].type: must be one of text, image, audio"),
        (changed("messages", 0, "content", 0, type={}), "content[0].type: must be one of text, image, audio, video"),
        (changed("messages", 0, "content", 0, url="x"), "content[0].url: unknown key; allowed are type, path"),
        (changed("messages", 0, "content", 0, path=...), "messages[0].content[0].path: is missing"),
        (changed("messages", 0, "content", 0, path="/a"), "content[0].path: the path must be relative to the root"),
        (changed("messages", 0, "content", 0, path="../a"), "content[0].path: the path must not hold '..'"),
        (changed("messages", 0, "content", 0, path=3), "content[0].path: must be a string, got a number"),
        (changed("messages", 0, "content", 1, text=None), "messages[0].content[1].text: must be a string, got null"),
        (
            changed("messages", 1, content=[{"type": "image", "path": "a"}, {"type": "text", "text": "x"}]),
            "messages[1].content[0]: media may stand only in a user's message, got 'image' in the assistant's",
        ),
    ],
)
def test_every_bad_row_names_line_and_key(tmp_path: Path, row: dict, message: str) -> None:
    path = manifest(tmp_path, changed(id="first"), row)
    with pytest.raises(ValueError, match=r"m\.jsonl:2: ") as caught:
        read_manifest(path, tmp_path)
    assert message in str(caught.value)
    assert message in "".join(list(scan_manifest(path, tmp_path))[1].problems)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", "not JSON: Expecting property name"),
        (b"[1, 2]\n", "a row must be a JSON object, got a list"),
        (b"\0\0\0\n", "not JSON"),
        (b'{"id": "\xff"}\n', "not UTF-8: byte 9 of the line is 0xff"),
        (json.dumps(GOOD).encode("utf-16") + b"\n", "not UTF-8: byte 1 of the line is 0xff"),
        (b'{"id": "x", "id": "y"}\n', "not JSON: the key 'id' stands twice in one object"),
        (b'{"meta": NaN}\n', "not JSON: NaN is no JSON number"),
        (b'{"meta": 1' + b"0" * 10_000 + b"}\n", "not JSON: it holds a number with too many digits"),
        (b'{"meta": -1e999}\n', "not JSON: the number -1e999 is too large"),
        (b"[" * 100_000 + b"\n", "not JSON: nested too deeply"),
        (b'{"a":' * 100_000 + b"\n", "not JSON: nested too deeply"),
        (b" " * (MAX_LINE_BYTES + 5) + b"{}\n", "the line is longer than"),
        (json.dumps(changed(id="\ud800")).encode() + b"\n", "half of a surrogate pair"),
    ],
)
def test_hostile_lines_are_refused_and_the_next_line_is_still_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = manifest(tmp_path, line, GOOD)
    first, second = scan_manifest(path, tmp_path)
    assert first.sample is None
    assert message in first.problems[0]
    assert (second.line_number, second.problems) == (2, ())
    with pytest.raises(ValueError, match=r"m\.jsonl:1: "):
        read_manifest(path, tmp_path)


def test_a_row_with_several_problems_names_them_all(tmp_path: Path) -> None:
    row = {"id": 1, "messages": [{"role": "x", "content": []}], "surprise": 0}
    with pytest.raises(ValueError, match="row 5: ") as caught:
        parse_row(row, tmp_path, where="row 5")
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["id", "messages[0].content", "messages[0].role", "surprise", "task"]


def test_an_id_may_occur_once(tmp_path: Path) -> None:
    path = manifest(tmp_path, GOOD, changed(id="b"), GOOD)
    with pytest.raises(ValueError, match=r"m\.jsonl:3: id: 'a' was already used on line 1"):
        read_manifest(path, tmp_path)
    sample = parse_row(GOOD, tmp_path)
    with pytest.raises(ValueError, match="id: used twice"):
        write_manifest(tmp_path / "out.jsonl", [sample, sample])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_sample_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    bad = Sample("a", (Message("user", (Media("image", "/etc/passwd"),)), Message("assistant", (Text("x"),))), "vqa")
    with pytest.raises(ValueError, match="the path must be relative"):
        write_manifest(tmp_path / "m.jsonl", [bad])
    assert not list(tmp_path.iterdir())


def test_an_empty_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sample"):
        read_manifest(manifest(tmp_path, b"\n\n"), tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_manifest(tmp_path / "nowhere.jsonl", tmp_path)


def test_random_damage_is_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [json.dumps(changed(id=f"s{number}"), indent=None).encode() for number in range(4)]
    for _ in range(60):
        data = bytearray(b"\n".join(rows))
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            data[start : start + rng.randint(0, 6)] = bytes(rng.choices(b'\0\xff{}[]",:\\\n\r\x85a1', k=3))
        path = manifest(tmp_path, bytes(data))
        for row in scan_manifest(path, tmp_path):
            assert (row.sample is None) == bool(row.problems)
            if row.sample is not None:
                write_manifest(tmp_path / "again.jsonl", [row.sample])
                assert read_manifest(tmp_path / "again.jsonl", tmp_path) == [row.sample]


def test_what_many_rows_say_alike_is_kept_once(tmp_path: Path) -> None:
    """Of a million rows roles, tasks and short answers would take more memory than what tells them apart."""
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    row = {"task": "vqa", "kind": "colour", "messages": messages}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": f"s{number}", **row}) + "\n" for number in range(2)))
    one, other = read_manifest(tmp_path / "a.jsonl", tmp_path)
    assert one.messages == other.messages
    assert one.messages[1].parts[0] is other.messages[1].parts[0]
    assert one.task is other.task
    assert one.meta is other.meta
    assert one.messages[0].role is other.messages[0].role
