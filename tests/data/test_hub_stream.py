"""Streams of a hub's data set, from a hub on this machine: rows and order of a copy on the disk, bytes fetched late."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_hub
from toy_hub import ToyHub
from webdataset_shards import write_shard, write_texts

from mllm.config.data import Format, ReaderConfig
from mllm.data.hub import HubListing, HubShard, hub_name, list_shards
from mllm.data.hub_cache import HubCache, Stopped, _Fetch, counting
from mllm.data.manifest import Sample
from mllm.data.shard_stream import Shards, StreamedSample
from mllm.media import resolve_media
from mllm.media.limits import DEFAULT_LIMITS, open_media

REPO = "owner/set"
TARS = ReaderConfig(format="webdataset")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    """An empty hub, and a client that does not wait long between its tries."""
    monkeypatch.setattr("mllm.data.hub.SECONDS_BETWEEN_TRIES", (0.01, 0.01))
    with toy_hub.serving() as served:
        toy_hub.use(served, tmp_path / "cache", monkeypatch)
        yield served


def streamed(
    name: str, reader: ReaderConfig = TARS, commit: str | None = None, cache: HubCache | None = None
) -> Shards:
    return Shards.of([name], None, reader, listings={name: list_shards(name, reader, commit)}, hub_cache=cache)


def row_of(one: StreamedSample) -> Any:
    """A sample without where its media lie: their names in the shard, which stands at the end of their paths."""
    assert isinstance(one.sample, Sample), one.sample
    media = [part.path.rpartition("/")[2] for part in one.sample.media]
    return one.position, one.epoch, one.sample.id, one.sample.task, [m.text for m in one.sample.messages], media


def write_tables(folder: Path, sizes: list[int]) -> None:
    """Write parquet of images and questions with the features that `datasets` (5.2.0) notes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    text = {"dtype": "string", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "question": text, "answer": text}
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    for number, size in enumerate(sizes):
        rows = [
            {"image": {"bytes": b"image %d %d" % (number, row), "path": None}, "question": "what?", "answer": str(row)}
            for row in range(size)
        ]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(notes)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        file = folder / "data" / f"train-{number:05d}-of-{len(sizes):05d}.parquet"
        parquet.write_table(table, file, row_group_size=2)


@pytest.mark.parametrize("form", ["webdataset", "datasets", "parquet"])
def test_rows_and_order_are_those_of_the_same_shards_on_a_disk(hub: ToyHub, tmp_path: Path, form: Format) -> None:
    folder = tmp_path / "shards"
    if form == "webdataset":
        write_texts(folder / "a-b", [3, 1])
        write_texts(folder / "a", [4, 0, 2])
        write_shard(folder / "z.tar", {"x/2": {"wav": b"x", "txt": b"what is said"}})
    else:
        write_tables(folder, [3, 5, 1, 2])
    (folder / "README.md").write_text("# A card")
    hub.push(REPO, folder)
    reader = ReaderConfig(format=form)
    name = f"hf://datasets/{REPO}" if form == "parquet" else REPO
    local, remote = Shards.of([str(folder)], None, reader), streamed(name, reader)
    for slot, num_slots in ((0, 1), (0, 2), (1, 2), (5, 7)):
        where = {"slot": slot, "num_slots": num_slots, "num_epochs": 2}
        expected = list(local.samples(3, **where))
        assert list(map(row_of, remote.samples(3, num_ahead=1, **where))) == list(map(row_of, expected))
        for one in expected[:: len(expected) // 2]:
            assert row_of(next(remote.samples(3, start=one.position, **where))) == row_of(one)
    assert set(hub.fetched.values()) == {1}
    assert "README.md" not in hub.fetched


def test_media_are_read_from_the_fetched_shard(hub: ToyHub, tmp_path: Path) -> None:
    write_tables(tmp_path / "tables", [2])
    write_shard(tmp_path / "tars" / "0.tar", {"1": {"png": b"in a tar", "txt": b"red"}})
    hub.push(REPO, tmp_path / "tables")
    hub.push("owner/tars", tmp_path / "tars")
    tables = streamed(REPO, ReaderConfig(format="datasets"))
    cache = HubCache(tmp_path / "bounded", 10**6)
    for shards, contents in (
        (tables, [b"image 0 0", b"image 0 1"]),
        (streamed("owner/tars"), [b"in a tar"]),
        (streamed("owner/tars", cache=cache), [b"in a tar"]),
    ):
        samples = [one.sample for one in shards.samples(0, num_epochs=1)]
        for sample, content in zip(samples, contents, strict=True):
            assert isinstance(sample, Sample)
            with open_media(resolve_media(sample.root, sample.media[0].path), DEFAULT_LIMITS.image_bytes) as file:
                assert file.read() == content


def test_only_shards_whose_turn_comes_are_fetched(hub: ToyHub, tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [2] * 6)
    hub.push(REPO, tmp_path / "shards")
    shards = streamed(REPO)
    assert hub.num_listed == 4  # six shards and a folder, in pages of two
    assert not hub.fetched
    stream = shards.samples(0)
    next(stream)
    next(stream)
    assert sum(hub.fetched.values()) == 1
    next(stream)
    assert sum(hub.fetched.values()) == 2
    ahead = shards.samples(0, num_ahead=2)
    next(ahead)
    for fetch in list(shards.hub_cache._fetches.values()):  # type: ignore[union-attr]
        fetch.result.result(timeout=30)
    assert sum(hub.fetched.values()) == 3


def test_a_connection_that_breaks_goes_on_where_it_broke(
    hub: ToyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    write_texts(tmp_path / "shards", [200])
    size = (tmp_path / "shards" / "000000.tar").stat().st_size
    hub.push(REPO, tmp_path / "shards")
    hub.cuts["000000.tar"] = [size // 3, size // 2]
    local = Shards.of([str(tmp_path / "shards")], None, TARS)
    rows = list(map(row_of, streamed(REPO).samples(0, num_epochs=1)))
    assert rows == list(map(row_of, local.samples(0, num_epochs=1)))
    assert hub.fetched["000000.tar"] == 3
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in hub.ranges["000000.tar"] if asked]
    assert starts == [size // 3 // 1000 * 1000, size // 2 // 1000 * 1000]


def test_a_read_that_fails_is_tried_again_and_then_refused_by_name(
    hub: ToyHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its own tries
    write_texts(tmp_path / "shards", [2])
    commit = hub.push(REPO, tmp_path / "shards")
    hub.errors["000000.tar"] = 8
    shards = streamed(REPO)
    with caplog.at_level(logging.WARNING, "mllm"):
        assert len(list(shards.samples(0, num_epochs=1))) == 2
    assert f"hf://datasets/{REPO}@{commit}/000000.tar" in caplog.text
    assert "trying again in" in caplog.text
    other = hub.commit(REPO, {"b.tar": b"x"}, "other")
    hub.errors["b.tar"] = 10**6
    with pytest.raises(ConnectionError, match=rf"{other}/b.tar: the hub did not give it at any of 3 tries: .*503"):
        next(streamed(f"{REPO}@other").samples(0))
    hub.errors["api"] = 10**6
    with pytest.raises(ConnectionError, match=rf"train names {REPO}, which is no .* here: the hub did not give it"):
        list_shards(REPO, TARS)


def test_a_hub_that_does_not_answer_is_not_waited_for(hub: ToyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm.data.hub.SECONDS_TO_ANSWER", 0.1)
    hub.commit(REPO, {"a.tar": b"a"})
    hub.delays["api"] = 1.0
    with pytest.raises(ConnectionError, match=r"the hub did not give it at any of 3 tries: .*timed out"):
        list_shards(REPO, TARS)


def test_a_file_that_is_not_as_long_as_the_hub_lists_is_refused(hub: ToyHub, tmp_path: Path) -> None:
    commit = hub.commit(REPO, {"a.tar": b"x" * 100})
    listing = HubListing(REPO, commit, [("a.tar", 101)])
    shards = Shards.of([REPO], None, TARS, listings={REPO: listing})
    with pytest.raises(ConnectionError, match=r"a.tar has 100 bytes, and the hub lists 101"):
        next(shards.samples(0))


def test_a_revision_that_moves_does_not_change_what_a_run_reads(hub: ToyHub, tmp_path: Path) -> None:
    write_texts(tmp_path / "old", [2, 2, 2])
    write_texts(tmp_path / "new", [5, 1])
    old = hub.push(REPO, tmp_path / "old")
    before = streamed(REPO)
    stream = before.samples(0, num_epochs=1)
    rows = [row_of(next(stream))]
    new = hub.push(REPO, tmp_path / "new")
    rows += map(row_of, stream)
    local = Shards.of([str(tmp_path / "old")], None, TARS)
    assert rows == list(map(row_of, local.samples(0, num_epochs=1)))
    assert before.facts()["commits"] == {REPO: old}
    resumed = streamed(REPO, commit=old)
    assert resumed.facts() == before.facts()
    assert list(map(row_of, resumed.samples(0, num_epochs=1))) == rows
    assert streamed(REPO).facts()["commits"] == {REPO: new}


def test_the_disk_holds_no_more_than_was_allowed(hub: ToyHub, tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [2] * 6)
    size = (tmp_path / "shards" / "000000.tar").stat().st_size
    hub.push(REPO, tmp_path / "shards")
    cache = HubCache(tmp_path / "own", 3 * size)
    shards = streamed(REPO, cache=cache)

    def num_bytes() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "own").rglob("*.tar*") if file.suffix != ".metadata")

    stream = shards.samples(0, num_epochs=4, num_ahead=1)
    most = 0
    for one in stream:
        stream.let_go_before(one.position.unit)
        most = max(most, num_bytes())
    assert 2 * size <= most <= 3 * size
    assert sum(hub.fetched.values()) > 12  # what was deleted is fetched again in the next epoch
    assert not list((tmp_path / "cache").rglob("*.tar"))
    stream.close()
    with pytest.raises(
        ValueError, match=r"data.stream.max_disk_gb is .* lie in 3 shards .* does not fit; raise it, or"
    ):
        list(shards.samples(0, num_epochs=1))
    del shards, stream, cache
    assert not (tmp_path / "own").exists()


def test_ahead_never_takes_the_room_of_what_is_read(hub: ToyHub, tmp_path: Path) -> None:
    write_texts(tmp_path / "shards", [2] * 4)
    size = (tmp_path / "shards" / "000000.tar").stat().st_size
    hub.push(REPO, tmp_path / "shards")
    cache = HubCache(tmp_path / "own", 2 * size)
    one, two, three, four = streamed(REPO).shards
    assert all(isinstance(shard, HubShard) for shard in (one, two, three, four))
    cache.hold(one)  # type: ignore[arg-type]
    cache.fetch_ahead(two)  # type: ignore[arg-type]
    cache.fetch_ahead(three)  # type: ignore[arg-type]
    cache.hold(four)  # type: ignore[arg-type]
    for shard in (one, four):
        assert cache.wait_for(shard)[0].stat().st_size == size  # type: ignore[arg-type]
    assert set(hub.fetched) == {"000000.tar", "000001.tar", "000003.tar"}


def test_bytes_that_hf_xet_reports_are_counted_once(hub: ToyHub) -> None:
    """By the client's own reporter, which a hub is needed for otherwise that keeps its files in Xet."""
    from huggingface_hub.utils import _xet_progress_reporting as reporting

    fetch = _Fetch(HubShard(REPO, "0" * 40, "a.tar", 100))
    bars = counting(fetch, stop := threading.Event())
    options: dict[str, Any] = {"reconstruction_desc": "a.tar", "total": 100, "log_level": logging.INFO}
    with reporting.XetDownloadProgressReporter(**options, tqdm_class=bars) as reporter:
        for written, came in ((10, 5), (100, 50)):
            rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": 1.0}
            bytes_now = {"total_bytes_completed": written, "total_transfer_bytes_completed": came}
            report = SimpleNamespace(total_bytes=100, total_transfer_bytes=50, **bytes_now, **rates)
            reporter.update_progress(report)
            assert fetch.num_bytes_here == written
        stop.set()
        with pytest.raises(Stopped):
            reporter.reconstruction_bar.update(1)


def test_long_waits_are_told(
    hub: ToyHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm.data.hub_cache.SECONDS_BETWEEN_LINES", 0.05)
    write_texts(tmp_path / "shards", [2])
    hub.push(REPO, tmp_path / "shards")
    hub.delays["000000.tar"] = 0.4
    with caplog.at_level(logging.INFO, "mllm"):
        next(streamed(REPO).samples(0))
    assert "/000000.tar: 0.0 of 0.0 MB in 0 seconds" in caplog.text


def test_names_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "too").mkdir(parents=True)

    def parsed(name: str, form: Format = "webdataset") -> tuple[Any, ...] | None:
        found = hub_name(name, ReaderConfig(format=form))
        return found and (found.repo, found.revision, found.path)

    assert parsed("a/b") == parsed("hf://datasets/a/b/") == ("a/b", None, "")
    assert parsed("a/b@v1.0") == parsed("hf://datasets/a/b@v1.0") == ("a/b", "v1.0", "")
    converted = "refs/convert/parquet"
    assert parsed(f"a/b@{converted}", "datasets") == parsed(f"hf://datasets/a/b@{converted}") == ("a/b", converted, "")
    assert parsed("hf://datasets/a/b@refs/pr/7/x/*.tar") == ("a/b", "refs/pr/7", "x/*.tar")
    assert parsed("hf://datasets/a/b@team%2Fbranch/x.tar") == ("a/b", "team/branch", "x.tar")
    for local in ("here/too", "shards/000.tar", "/a/b", "a/{0..9}.tar", "a", "a/b/c"):
        assert parsed(local) is None
    assert parsed("a/b", "parquet") is None
    for wrong in ("hf://a/b", "hf://models/a/b", "hf://datasets/a", "hf://datasets/a/b@/x"):
        with pytest.raises(ValueError, match=r"data sets of a hub are hf://datasets/OWNER/NAME\[@REVISION\]"):
            parsed(wrong)


def test_patterns_folders_and_splits_of_a_hub(hub: ToyHub) -> None:
    names = [
        "a/0.tar",
        "a/1.tar",
        "a/b/0.tar",
        "c/train-00000-of-00001.parquet",
        "c/test-00000-of-00001.parquet",
        "x.tar",
    ]
    hub.commit(REPO, {name: name.encode() for name in names})
    hub.commit("owner/plain", {name: name.encode() for name in ("p/0.parquet", "p/1.parquet")})
    hub.commit("owner/json", {"a.jsonl": b"{}"})
    hub.commit(
        "owner/json", {"default/train/0000.parquet": b"0", "default/test/0000.parquet": b"1"}, "refs/convert/parquet"
    )

    def listed(name: str, form: Format = "webdataset", split: str | None = None) -> list[str]:
        return [path for path, _ in list_shards(name, ReaderConfig(format=form, split=split)).files]

    address = f"hf://datasets/{REPO}"
    assert listed(REPO) == ["a/0.tar", "a/1.tar", "a/b/0.tar", "x.tar"]
    assert listed(f"{address}/a") == listed(f"{address}/a/**/*.tar") == ["a/0.tar", "a/1.tar", "a/b/0.tar"]
    assert listed(f"{address}/a/{{1..0}}.tar") == ["a/1.tar", "a/0.tar"]
    assert listed(f"{address}@main/*.tar") == listed(f"{address}/x.tar") == ["x.tar"]
    assert listed(REPO, "datasets") == ["c/train-00000-of-00001.parquet"]
    assert listed(f"{address}/c", "parquet", "test") == ["c/test-00000-of-00001.parquet"]
    assert len(listed(f"{address}/c/*.parquet", "parquet")) == 2
    assert listed("owner/plain", "datasets") == ["p/0.parquet", "p/1.parquet"]
    assert listed("owner/json", "datasets") == ["default/train/0000.parquet"]
    with pytest.raises(FileNotFoundError, match=r"no such shard:\na/2.tar$"):
        listed(f"{address}/a/{{0..2}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no table of the split dev; .*there are tables of test, train"):
        listed(REPO, "datasets", "dev")
    with pytest.raises(FileNotFoundError, match=r"owner/plain, and owner/plain holds no \*.tar at [0-9a-f]{40}"):
        listed("owner/plain")
    with pytest.raises(ValueError, match=r"the hub lists '../x.tar' of owner/set"):
        HubListing(REPO, "0" * 40, [("../x.tar", 1)])


def test_what_cannot_be_had_is_refused_with_what_to_do(hub: ToyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit(REPO, {"a.tar": b"a"})
    hub.gated.add(REPO)
    with pytest.raises(
        PermissionError, match=rf"{commit}/a.tar: {REPO} is gated; ask for access on .*/datasets/{REPO}"
    ):
        next(streamed(REPO).samples(0))
    with pytest.raises(
        FileNotFoundError, match=r"the hub has no data set owner/other, .*; if it is private, log in with"
    ):
        list_shards("owner/other", TARS)
    with pytest.raises(
        FileNotFoundError, match=rf"{REPO} has no revision v9; .*/datasets/{REPO}/tree/main shows those"
    ):
        list_shards(f"{REPO}@v9", TARS)
    with pytest.raises(ValueError, match=r"data.train names a--b/c, .*: .*a--b/c"):
        list_shards("a--b/c", TARS)
    gone = Shards.of([REPO], None, TARS, listings={REPO: HubListing("owner/set", commit, [("b.tar", 1)])})
    hub.gated.clear()
    with pytest.raises(FileNotFoundError, match=rf"b.tar: {REPO} holds no such file at {commit}"):
        next(gone.samples(0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set, and the cache does not hold owner/set"):
        list_shards(REPO, TARS)


def test_offline_a_stream_reads_what_the_cache_holds(
    hub: ToyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_texts(tmp_path / "shards", [2, 1])
    commit = hub.push(REPO, tmp_path / "shards")
    online = streamed(REPO)
    rows = list(map(row_of, online.samples(0, num_epochs=1)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING, "mllm"):
        offline = streamed(f"{REPO}@{commit}")
    assert f"the 2 shards that the cache holds of {REPO} at {commit} are taken for all there are" in caplog.text
    assert list(map(row_of, offline.samples(0, num_epochs=1))) == rows
    assert offline.facts()["sha256"] == online.facts()["sha256"]


def test_media_are_read_where_the_client_keeps_what_data_sets_share_once(
    hub: ToyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub 2.4 lays out its cache: the blob of a data set is a link to one of the whole cache."""
    write_shard(tmp_path / "tars" / "0.tar", {"1": {"png": b"in a tar", "txt": b"red"}})
    commit = hub.push(REPO, tmp_path / "tars")
    of_set, shared = tmp_path / "cache" / "datasets--owner--set", tmp_path / "cache" / "blobs" / "ab" / "abc"
    for folder in (shared.parent, of_set / "blobs", of_set / "snapshots" / commit):
        folder.mkdir(parents=True)
    (tmp_path / "tars" / "0.tar").rename(shared)
    (of_set / "blobs" / "x").symlink_to("../../blobs/ab/abc")
    (of_set / "snapshots" / commit / "0.tar").symlink_to("../../blobs/x")
    (one,) = streamed(REPO).samples(0, num_epochs=1)
    assert isinstance(one.sample, Sample)
    with open_media(resolve_media(one.sample.root, one.sample.media[0].path), 1000) as file:
        assert file.read() == b"in a tar"
    assert not hub.fetched


def test_what_is_on_its_way_ends_with_its_reader_and_leaves_nothing(hub: ToyHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"a.tar": b"x" * 10**6})
    hub.delays["a.tar"] = 0.3
    (shard,) = streamed(REPO).shards
    assert isinstance(shard, HubShard)
    cache = HubCache(tmp_path / "own", 10**7)
    cache.fetch_ahead(shard)
    (thread,) = cache._threads
    while not hub.fetched:
        time.sleep(0.01)
    cache._end()
    assert not thread.is_alive()
    assert not (tmp_path / "own").exists()
