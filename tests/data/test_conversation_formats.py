"""ShareGPT, OpenAI's and ms-swift's rows, tables and tars become samples; media inside are read where they lie."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
from PIL import Image

from mllm.cli import main
from mllm.config.data import Format, ReaderConfig
from mllm.data.check import check_listing
from mllm.data.guessing import guess_format
from mllm.data.json_files import _begins_as_list
from mllm.data.manifest import Media, Sample, Text, read_manifest
from mllm.data.readers import read_data, read_listing
from mllm.lip_crops.run import find_recordings
from mllm.media import MediaError, MediaLimits, load_audio, load_image, resolve_media
from mllm.media.containers import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from mllm.media.image import header_pixels
from mllm.media.limits import digest_of_media

RED, BLUE = (255, 0, 0), (0, 0, 255)


def image(colour: tuple[int, int, int] = RED) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(held, "PNG")
    return held.getvalue()


def wav_bytes(level: float = 0.5) -> bytes:
    held = io.BytesIO()
    soundfile.write(held, np.full(8_000, level), 16_000, format="WAV")
    return held.getvalue()


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source: Path, form: Format, **settings: Any) -> list[Sample]:
    root = source if source.is_dir() else source.parent
    return read_data(source, root, ReaderConfig(format=form, **settings))


def colour_of(sample: Sample, number: int = 0) -> tuple[int, ...]:
    image = load_image(resolve_media(sample.root, sample.media[number].path))
    return tuple(np.asarray(image)[3, 3].tolist())


def question_turns(text: str, answer: str = "x") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def said(text: str, answer: str = "x") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize("as_list", [True, False])
def test_sharegpt_as_a_list_and_by_lines(tmp_path: Path, as_list: bool) -> None:
    rows = [
        {"conversations": said("<image>What?", "A cat."), "images": ["a.png"], "system": "Be kind."},
        {
            "id": 7,
            "task": "own",
            "conversations": said("Look: <image> and <video>."),
            "image": "b.png",
            "videos": "c.mp4",
        },
        {"conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Sure?", "assistant": "Yes"}]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows)) if as_list else lines(path, *rows)
    first, second, third = read(path, "sharegpt")
    assert [message.role for message in first.messages] == ["system", "user", "assistant"]
    assert first.messages[1].parts == (Media("image", "a.png"), Text("What?"))
    start = 0 if as_list else 1
    assert [(one.id, one.task) for one in (first, second, third)] == [
        (f"data-{start}", "vqa"),
        ("7", "own"),
        (f"data-{start + 2}", "chat"),
    ]
    expected = (Text("Look: "), Media("image", "b.png"), Text(" and "), Media("video", "c.mp4"), Text("."))
    assert second.messages[0].parts == expected
    assert [message.text for message in third.messages] == ["Hi", "Hello", "Sure?", "Yes"]


def test_messages_of_openai_and_ms_swift(tmp_path: Path) -> None:
    answer = question_turns("")[1]
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    path = lines(
        tmp_path / "m.jsonl",
        {"messages": [{"role": "user", "content": [url, {"type": "text", "text": "What?"}]}, question_turns("")[1]]},
        {"messages": question_turns("<image>What?"), "images": [{"path": "a.png", "bytes": None}]},
        {"messages": question_turns("What?"), "images": ["a.png"]},  # no marker: before the question
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, answer],
         "images": ["a.png"]},
        {"query": "<image>What?", "response": "x", "history": [], "images": ["a.png"]},
        {"messages": [{"role": "developer", "content": "Be kind."}, *question_turns("<audio><audio>Which?")],
         "audios": ["1.wav", "2.wav"]},
        {"query": "And?", "response": "y", "history": [["One?", "1"], ["Two?", "2"]]},
        {"messages": question_turns("How does <image> work in HTML?")},
    )  # fmt: skip
    *images, audio_sample, history, text = read(path, "messages")
    for sample in images:
        assert sample.messages[0].parts == (Media("image", "a.png"), Text("What?"))
    assert [message.role for message in audio_sample.messages] == ["system", "user", "assistant"]
    assert audio_sample.media == (Media("audio", "1.wav"), Media("audio", "2.wav"))
    assert (audio_sample.id, audio_sample.task) == ("m-6", "audio_qa")
    assert [message.text for message in history.messages] == ["One?", "1", "Two?", "2", "And?", "y"]
    assert text.messages[0].parts == (Text("How does <image> work in HTML?"),)
    assert read(path, "messages") == [*images, audio_sample, history, text]  # made-up ids are always the same


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": question_turns("<image><image>?"), "images": ["a.png"]}, r"2 places \(<image>\) for 1 media"),
        ({"messages": question_turns("What?<image>")}, r"1 places \(<image>\) for 0 media"),
        ({"messages": question_turns("?"), "images": ["../a.png"]}, "must not hold '..'"),
        ({"messages": question_turns("<image>?"), "images": ["http://x/a.png"]}, "plain relative one"),
        ({"messages": question_turns("<image>?"), "images": ["data:image/png;base64,xx"]}, "stands in the row itself"),
        ({"messages": question_turns("<image>?"), "images": [{"bytes": "xx"}]}, "stands in the row itself"),
        ({"messages": [*question_turns("?"), {"role": "tool", "content": "x"}]}, "role: must be one of"),
        (
            {"messages": [question_turns("?")[0], {**question_turns("")[1], "tool_calls": [1]}]},
            "tool_calls, which is not read",
        ),
        ({"messages": question_turns("?"), "tools": [{"name": "x"}]}, "tools: it changes what is learned"),
        ({"messages": question_turns("?"), "rejected_response": "y"}, "rejected_response: it changes"),
        ({"messages": [{"role": "user", "content": "?"}]}, "the last message must be the assistant's"),
        ({"messages": question_turns("?"), "id": [1]}, "id: must be a string or a whole number"),
        ({"messages": question_turns("?"), "task": 3}, "task: must be a string"),
        ({"query": "?"}, "'response' is missing"),
        ({"text": "x"}, "there is no messages and no query; it has text"),
    ],
)
def test_one_odd_row_is_one_finding(tmp_path: Path, row: dict, message: str) -> None:
    path = lines(tmp_path / "m.jsonl", {"messages": question_turns("?")}, row, {"messages": question_turns("?")})
    listing = read_listing(path, tmp_path, ReaderConfig(format="messages"))
    (finding,) = listing.problems
    assert finding.line_number == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(finding))
    assert [sample.id for sample in listing.samples] == ["m-1", "m-3"]


def test_keys_that_are_not_read_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": question_turns("?"), "source": "web", "score": 3} for _ in range(5)]
    assert len(read(lines(tmp_path / "m.jsonl", *rows), "messages")) == 5
    assert caplog.text.count("5 rows hold the key 'source', which is not read") == 1


CELL = {"bytes": image(), "path": "a.png"}
OTHER = {"bytes": image(BLUE), "path": None}


def table(path: Path, rows: list[dict], *, features: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a parquet file, with the notes of `datasets` where features are given."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = pa.Table.from_pylist(rows)
    if features is not None:
        content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(content, path, **options)
    return path


@pytest.mark.parametrize("row_group_size", [1, 3, 1_000])
def test_parquet_with_images_inside(tmp_path: Path, row_group_size: int) -> None:
    rows = [
        {"messages": question_turns(f"<image>{n}?"), "images": [OTHER if n % 2 else CELL], "n": n} for n in range(7)
    ]
    rows.append({"messages": question_turns("<image><image>?"), "images": [CELL, OTHER], "n": 7})
    rows.append({"messages": question_turns("Only text."), "images": [], "n": 8})
    rows.append({"messages": question_turns("None."), "images": None, "n": 9})
    samples = read(table(tmp_path / "t.parquet", rows, row_group_size=row_group_size), "parquet")
    assert [sample.id for sample in samples] == [f"t-{n}" for n in range(10)]
    assert [colour_of(sample) for sample in samples[:7]] == [RED, BLUE] * 3 + [RED]
    assert [colour_of(samples[7], index) for index in (0, 1)] == [RED, BLUE]
    assert [len(sample.media) for sample in samples[8:]] == [0, 0]
    assert [sample.task for sample in samples[6:9]] == ["vqa", "vqa", "chat"]
    assert header_pixels(resolve_media(tmp_path, samples[0].media[0].path)) == (6, 8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.parquet"]  # nothing was unpacked anywhere


def test_columns_are_media_by_their_features_or_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"what": CELL, "blob": b"123", "caption": "red"}]
    (sample,) = read(table(tmp_path / "t.parquet", rows, features={"what": {"_type": "Image"}}), "parquet")
    assert (colour_of(sample), sample.task, sample.messages[-1].text) == (RED, "caption", "red")
    assert "the key 'blob', which is not read" in caplog.text
    (sample,) = read(table(tmp_path / "u.parquet", [{"audio": wav_bytes(), "text": "hello"}]), "parquet")
    assert sample.task == "asr"
    assert sample.messages[0].parts[1] == Text("Transcribe speech to text.")
    result = load_audio(resolve_media(tmp_path, sample.media[0].path)).samples
    np.testing.assert_allclose(result, 0.5, atol=1e-4)
    cauldron = [{"images": [CELL], "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}]}]
    (sample,) = read(table(tmp_path / "v.parquet", cauldron), "parquet")
    assert sample.messages[0].parts == (Media("image", "v.parquet@0.0.0"), Text("What?"))
    written = [{"conversations": json.dumps(said("<image>?")), "image": CELL}]
    (sample,) = read(table(tmp_path / "w.parquet", written), "parquet")
    assert colour_of(sample) == RED


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary"])
def test_every_way_that_pyarrow_holds_bytes_is_read(tmp_path: Path, kind: str) -> None:
    """Whichever a library writes: views come of polars, dictionaries of categories."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [image(RED), image(BLUE)]
    held = pa.array(values).dictionary_encode() if kind == "dictionary" else pa.array(values, getattr(pa, kind)())
    try:
        parquet.write_table(pa.table({"image": held, "caption": ["red", "blue"]}), tmp_path / "t.parquet")
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} writes no column of {kind}, so nobody has one to read with it")
    assert [colour_of(sample) for sample in read(tmp_path / "t.parquet", "parquet")] == [RED, BLUE]


def saved_to_disk(folder: Path, rows: list[dict]) -> Path:
    """Write what `Dataset.save_to_disk` of datasets leaves: arrow streams in batches, and a state that names
    the split.
    """
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    one = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, one.schema) as out:
        for batch in one.to_batches(max_chunksize=2):
            out.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_split": "train", "_data_files": []}))
    return folder


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    rows = [{"messages": question_turns("<image>?"), "image": OTHER if n % 2 else CELL} for n in range(5)]
    samples = read(saved_to_disk(tmp_path / "d", rows), "datasets")
    assert [colour_of(sample) for sample in samples] == [RED, BLUE, RED, BLUE, RED]
    report = check_listing(tmp_path / "d", tmp_path / "d", ReaderConfig(format="datasets"), open_media=True)
    assert report.is_good
    assert dict(report.media) == {"image": 5}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a data set of a hub that cannot be reached; it is all there is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "datasets--owner--images"


def test_a_data_set_of_a_hub_by_its_name(hub: Path) -> None:
    """From the cache of huggingface_hub as a download leaves it: snapshots are links to blobs."""
    (hub / "refs").mkdir(parents=True)
    (hub / "blobs").mkdir()
    revision = "0" * 40
    (hub / "refs" / "main").write_text(revision)
    (hub / "snapshots" / revision / "data").mkdir(parents=True)
    table(hub / "blobs" / "abc", [{"messages": question_turns("<image>?"), "image": CELL}])
    link = hub / "snapshots" / revision / "data" / "train-00000-of-00001.parquet"
    link.symlink_to(os.path.relpath(hub / "blobs" / "abc", link.parent))
    (sample,) = read_data("owner/images", None, ReaderConfig(format="datasets"))
    assert (colour_of(sample), sample.id) == (RED, "train-00000-of-00001-0")


def fill(hub: Path, tables: dict[str, bool]) -> None:
    """Write the cache of a data set of which revisions hold a table or none."""
    for number, (revision, has_table) in enumerate(tables.items()):
        reference, snapshot = hub / "refs" / revision, hub / "snapshots" / f"{number:040d}"
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(snapshot.name)
        snapshot.mkdir(parents=True)
        (snapshot / "README.md").write_text(revision)
        if has_table:
            table(snapshot / "train-00000-of-00001.parquet", [{"messages": question_turns(revision)}])


def reply_of_hub(name: str) -> str:
    return read_data(name, None, ReaderConfig(format="datasets"))[0].messages[0].text


def test_the_hubs_conversion_never_stands_for_a_named_revision(hub: Path) -> None:
    fill(hub, {"main": False, "v1": False, "v2": True, "refs/convert/parquet": True})
    assert reply_of_hub("owner/images") == "refs/convert/parquet"
    assert reply_of_hub("owner/images@v2") == "v2"
    assert reply_of_hub("owner/images@refs/convert/parquet") == "refs/convert/parquet"
    message = "owner/images@v1 holds no parquet; the hub's conversion of the newest one is owner/images@"
    with pytest.raises(FileNotFoundError, match=message):
        reply_of_hub("owner/images@v1")


def test_a_folder_that_is_not_there_is_named_though_it_looks_like_a_name_of_the_hub(hub: Path) -> None:
    fill(hub, {"main": True})
    problem = "data/train: there is no such folder, and a data set of that name cannot be had of the hub: "
    with pytest.raises(FileNotFoundError, match=problem):
        reply_of_hub("data/train")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/validation-00000-of-00001", "data/test-00000-of-00001"], "test, validation"),
        (["default/partial-train/0000", "default/validation/0000"], "partial-train, validation"),
        (["train_sft-00000-of-00001", "test_sft-00000-of-00001"], "test_sft, train_sft"),
        (["easy-00000-of-00001", "hard-00000-of-00001"], "easy, hard"),
        (["dev"], "dev"),
    ],
)
def test_splits_are_never_mixed_where_none_is_named(tmp_path: Path, names: list[str], splits: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table(tmp_path / f"{name}.parquet", [{"messages": question_turns(name)}])
    message = rf"no table of the split train; .*there are tables of {splits} \(data\.reader\.split, or --split\)"
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path, "parquet")
    result = [read(tmp_path, "parquet", split=split) for split in splits.split(", ")]
    assert sorted(sample.messages[0].text for (sample,) in result) == sorted(names)


def test_tables_that_name_no_split_are_all_read(tmp_path: Path) -> None:
    folder = tmp_path / "validation"  # named by whoever reads it
    folder.mkdir()
    for name in ("a", "testimony", "0000"):
        table(folder / f"{name}.parquet", [{"messages": question_turns(name)}])
    assert [sample.messages[0].text for sample in read(folder, "parquet")] == ["0000", "a", "testimony"]


def test_splits_in_the_cache_of_datasets(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        one = pa.Table.from_pylist([{"messages": question_turns(split)}])
        path = str(tmp_path / f"chats-{split}.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, one.schema) as out:
            out.write_table(one)
    result = [sample.messages[0].text for sample in read(tmp_path, "datasets")]
    assert result == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [sample.messages[0].text for sample in read(tmp_path, "datasets", split="test")] == ["test"]
    with pytest.raises(FileNotFoundError, match="there are tables of test, train "):
        read(tmp_path, "datasets", split="validation")


@pytest.mark.parametrize("stated", [[1], True, 1.5])
def test_an_odd_id_is_a_finding_in_every_format(tmp_path: Path, stated: Any) -> None:
    row = {"id": stated, "messages": question_turns("?")}
    sources: dict[Format, Path] = {
        "messages": lines(tmp_path / "m.jsonl", row),
        "parquet": table(tmp_path / "t.parquet", [row]),
        "webdataset": shard(tmp_path / "a.tar", {"1.json": json.dumps(row).encode()}),
    }
    for form, source in sources.items():
        listing = read_listing(source, tmp_path, ReaderConfig(format=form))
        (finding,) = listing.problems
        assert "id: must be a string or a whole number, got a" in finding.message
        assert not listing.samples


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n\t\n", b" " * 10_000 + b"\r\n"])
def test_only_the_head_of_a_file_tells_whether_it_is_a_list(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(head + json.dumps([{"messages": question_turns("x" * 2**22)}]).encode())
    tracemalloc.start()
    assert _begins_as_list(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert [sample.id for sample in read(path, "messages")] == ["m-0"]
    path.write_bytes(head + json.dumps({"messages": question_turns("[")}).encode())
    assert not _begins_as_list(path)
    path.write_bytes(head)
    assert not _begins_as_list(path)


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset_tars(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    talk = {"conversations": said("<image>Which, <image>?", "the second"), "images": ["b.png", "a.png"], "id": "talk"}
    shard(
        tmp_path / "s" / "000.tar",
        {
            "x/1.png": image(BLUE),
            "x/1.json": json.dumps({"messages": question_turns("<image>What?", "blue")}).encode(),
            **{"2.png": image(), "2.txt": b"a red square\n"},
            **{"3.wav": wav_bytes(), "3.txt": "höre".encode()},
            **{"4.a.png": image(), "4.b.png": image(BLUE), "4.json": json.dumps(talk).encode()},
        },
    )
    shard(tmp_path / "s" / "001.tar", {"5.json": json.dumps({"messages": question_turns("Hi", "Hello")}).encode()})
    one, two, three, four, five = read(tmp_path / "s", "webdataset")
    assert [sample.id for sample in (one, two, three, four, five)] == ["x/1", "2", "3", "talk", "5"]
    assert (colour_of(one), one.messages[0].parts[1]) == (BLUE, Text("What?"))
    assert (colour_of(two), two.task, two.messages[-1].text) == (RED, "caption", "a red square")
    assert (three.task, three.messages[-1].text) == ("asr", "höre")
    assert load_audio(resolve_media(three.root, three.media[0].path)).seconds == 0.5
    assert len(four.media) == 2
    assert five.media == ()
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["000.tar", "001.tar", "s"]


@pytest.mark.parametrize(
    ("suffixes", "medium"), [(IMAGE_SUFFIXES, "image"), (AUDIO_SUFFIXES, "audio"), (VIDEO_SUFFIXES, "video")]
)
def test_every_reader_knows_the_same_suffixes(tmp_path: Path, suffixes: tuple[str, ...], medium: str) -> None:
    for number, suffix in enumerate(suffixes):
        path = shard(tmp_path / f"{number}.tar", {f"1{suffix.upper()}": b"x", "1.txt": b"hello"})
        (sample,) = read(path, "webdataset")
        assert [part.medium for part in sample.media] == [medium]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"a{suffix}").write_bytes(b"x")
        if medium == "image":
            continue
        assert guess_format(folder) == "clips"
        assert read_listing(folder, folder, ReaderConfig(format="clips")).untranscribed == [f"a{suffix}"]
        if medium == "video":
            assert find_recordings(folder, tmp_path / "out") == [("a", folder / f"a{suffix}")]


def test_tars_are_not_unpickled_and_odd_files_are_findings(tmp_path: Path) -> None:
    good = json.dumps({"messages": question_turns("Hi")}).encode()
    path = shard(
        tmp_path / "a.tar",
        {
            "1.json": good,
            "2.json": b"{",
            "3.pkl": pickle.dumps(Path("x")),
            "4.json": json.dumps({"messages": question_turns("<image>?")}).encode(),
            "5.png": image(),
            "6.json": good,
        },
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("7.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    listing = read_listing(path, tmp_path, ReaderConfig(format="webdataset"))
    assert [sample.id for sample in listing.samples] == ["1", "6"]
    message = [finding.message.partition(":")[0] for finding in listing.problems]
    assert message == ["2", "3", "4", "5", "7"]
    assert "a pickle, which could run code" in listing.problems[1].message
    assert "is a link" in listing.problems[4].message
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(path, "x")
    (finding,) = read_listing(tmp_path / "b.tar", tmp_path, ReaderConfig(format="webdataset")).problems
    assert "not a tar that is not compressed" in finding.message


def test_media_inside_other_files_obey_the_same_limits_and_roots(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    content = image()
    shard(tmp_path / "root" / "a.tar", {"1.png": content, "1.txt": b"x"})
    path = read(tmp_path / "root" / "a.tar", "webdataset")[0].media[0].path
    result = resolve_media(tmp_path / "root", path)
    for key in ("image_bytes", "image_pixels"):
        with pytest.raises(MediaError, match=rf"than 10 .*\(limits\.{key}\)") as caught:
            load_image(result, limits=MediaLimits.of({key: 10}))
        assert caught.value.kind == "limit"
    shard(tmp_path / "out.tar", {"1.png": content})
    (tmp_path / "root" / "link.tar").symlink_to(tmp_path / "out.tar")
    for name, kind in (
        ("../out.tar@512.99", "refused"),
        ("link.tar@512.99", "refused"),
        ("gone.tar@512.99", "missing"),
        ("a.tar@512", "missing"),
    ):
        with pytest.raises(MediaError, match=r"\.tar") as caught:
            resolve_media(tmp_path / "root", name)
        assert caught.value.kind == kind
    for numbers, kind in (
        ("512.99999", "missing"),
        ("99999999.5", "missing"),
        ("512.0", "empty"),
        ("0.100", "unsupported"),
    ):
        with pytest.raises(MediaError, match=r"a\.tar@") as caught:
            load_image(resolve_media(tmp_path / "root", f"a.tar@{numbers}"))
        assert caught.value.kind == kind


def test_cells_that_are_not_there(tmp_path: Path) -> None:
    table(tmp_path / "t.parquet", [{"image": CELL, "n": 1}, {"image": {"bytes": None, "path": "a.png"}, "n": 2}])
    for numbers in ("5.0", "0.9", "0.0.3", "1.0", "0.1"):
        with pytest.raises(MediaError, match="the table") as caught:
            load_image(resolve_media(tmp_path, f"t.parquet@{numbers}"))
        assert caught.value.kind == "missing"
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(MediaError, match="not a table that pyarrow reads") as caught:
        load_image(resolve_media(tmp_path, "bad.parquet@0.0"))
    assert caught.value.kind == "corrupt"


def test_a_changed_tar_is_seen_by_what_is_kept_of_it(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"1.png": image(), "1.txt": b"x"})
    index = resolve_media(tmp_path, read(tmp_path / "a.tar", "webdataset")[0].media[0].path)
    before = digest_of_media(index)
    shard(tmp_path / "a.tar", {"1.png": image(BLUE), "1.txt": b"x"})
    assert digest_of_media(index) != before


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        ("sharegpt", [{"conversations": said("<image>?"), "images": ["a.png"]}]),
        ("messages", [{"messages": question_turns("<image>?"), "images": ["a.png"]}]),
        ("llava", [{"id": "1", "image": "a.png", "conversations": said("<image>?")}]),
    ],
)
def test_the_command_checks_and_imports_any_format(tmp_path: Path, capsys, form: str, rows: list) -> None:
    (tmp_path / "a.png").write_bytes(image())
    path = lines(tmp_path / "d.jsonl", *rows)
    assert main(["data", "check", str(path), "--format", form, "--open"]) == 0
    assert "1 rows, 1 good samples" in capsys.readouterr().out
    assert main(["data", "import", form, str(path), "--out", str(tmp_path / "m.jsonl")]) == 0
    assert main(["data", "check", str(tmp_path / "m.jsonl"), "--open"]) == 0
    assert colour_of(read_manifest(tmp_path / "m.jsonl", tmp_path)[0]) == RED
    capsys.readouterr()
    assert main(["data", "check", str(path)]) == 1
    assert f"looks like format {form}" in capsys.readouterr().out
    other = "sharegpt" if form == "messages" else "messages"
    with pytest.raises(ValueError, match=f"nothing of format {other}, and looks like format {form}"):
        read_data(path, tmp_path, ReaderConfig(format=other))


@pytest.mark.parametrize("form", ["messages", "sharegpt", "llava"])
def test_an_absolute_path_below_the_root_is_that_of_the_root(tmp_path: Path, form: Format) -> None:
    """As ms-swift and Qwen's cookbooks write them; nothing else of the disk can be named so."""
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "data" / "x" / "a.png").write_bytes(image())
    named = [str(tmp_path / "data" / "x" / "a.png"), f"file://{tmp_path}/data/x/a.png", "x/a.png", "/etc/a.png"]
    named += [f"{tmp_path}/data/../a.png", str(tmp_path / "data"), f"{tmp_path}/data2/a.png"]
    if form == "llava":
        rows = [{"conversations": said("<image>?"), "image": name} for name in named]
    else:
        turns = {"messages": question_turns("<image>?")} if form == "messages" else {"conversations": said("<image>?")}
        rows = [{**turns, "images": [name]} for name in named]
    listing = read_listing(lines(tmp_path / "l.jsonl", *rows), tmp_path / "data", ReaderConfig(format=form))
    assert [sample.media[0].path for sample in listing.samples] == ["x/a.png"] * 3
    assert [finding.line_number for finding in listing.problems] == [4, 5, 6, 7]
    assert all("must be relative to the root" in finding.message for finding in listing.problems)


def test_what_is_something_else_altogether_is_told_in_a_few_lines(tmp_path: Path, capsys) -> None:
    (tmp_path / "s.wav").write_bytes(b"RIFF" + b"\xff\n" * 500)
    assert main(["data", "check", str(tmp_path / "s.wav")]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) < 25
    assert any(line.startswith("and ") and line.endswith(" more") for line in shown)
    swift = lines(tmp_path / "m.jsonl", *[{"messages": question_turns("?")}] * 2)
    assert main(["data", "check", str(swift), "--format", "sharegpt"]) == 1
    shown = capsys.readouterr().out
    assert "looks like format messages" in shown.splitlines()[0]
    assert "m.jsonl: 2 rows, 0 good samples" in shown


@pytest.mark.parametrize("name", ["t.parquet", "a.tar", "l.csv", "l.tsv", "clips/a.mp4"])
def test_what_a_file_looks_like_is_named(tmp_path: Path, name: str, capsys) -> None:
    forms = {"t.parquet": "parquet", "a.tar": "webdataset", "l.csv": "omni_csv", "l.tsv": "fairseq"}
    if name == "t.parquet":
        table(tmp_path / name, [{"messages": question_turns("?")}])
    elif name == "a.tar":
        shard(tmp_path / name, {"1.json": b"{}"})
    elif name == "clips/a.mp4":
        (tmp_path / "clips").mkdir()
        (tmp_path / name).write_bytes(b"x")
    else:
        (tmp_path / name).write_text("d,a.mp4,25,1 2,some text\n" if name == "l.csv" else "/\na\tb\tc\t1\t2\n")
    source = tmp_path / "clips" if name.startswith("clips") else tmp_path / name
    assert main(["data", "check", str(source), "--format", "sharegpt"]) in (1, 2)
    shown = capsys.readouterr()
    assert f"looks like format {forms.get(name, 'clips')}" in shown.out + shown.err
