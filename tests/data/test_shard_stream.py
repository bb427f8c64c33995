"""Streams of shards: who reads what, in which order, from where on; which names stand for which tars."""

import gc
import itertools
import json
import subprocess
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from webdataset_shards import write_shard, write_texts

from mllm.config.data import Format, ReaderConfig
from mllm.data.manifest import Sample
from mllm.data.readers import read_data
from mllm.data.shard_names import shard_files
from mllm.data.shard_stream import Position, Shards, StreamedSample
from mllm.data.skipped import SkippedSample


def tars(*names: str | Path) -> Shards:
    return Shards.of([str(name) for name in names], None, ReaderConfig(format="webdataset"))


def name_of(one: StreamedSample) -> str:
    return one.sample.id if isinstance(one.sample, Sample) else one.sample.sample_id


@pytest.mark.parametrize(("sizes", "num_slots"), [([3, 1, 4, 0, 2], 1), ([3, 1, 4, 0, 2], 4), ([7], 3), ([2, 5], 5)])
def test_every_sample_of_an_epoch_is_read_once_by_one_slot(tmp_path: Path, sizes: list[int], num_slots: int) -> None:
    ids = write_texts(tmp_path, sizes)
    shards = tars(tmp_path)
    read = [one for slot in range(num_slots) for one in shards.samples(7, slot=slot, num_slots=num_slots, num_epochs=3)]
    for epoch in range(3):
        assert sorted(name_of(one) for one in read if one.epoch == epoch) == ids
    assert len({one.position for one in read}) == len(read)


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    write_texts(tmp_path, [2] * 6)
    shards = tars(tmp_path)
    orders = [
        tuple(name_of(one) for one in shards.samples(seed, num_epochs=2) if one.epoch == epoch)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


@pytest.mark.parametrize(("sizes", "num_slots"), [([3, 1, 4, 0, 2], 2), ([7], 3)])
def test_a_stream_begins_at_any_position(tmp_path: Path, sizes: list[int], num_slots: int) -> None:
    write_texts(tmp_path, sizes)
    (tmp_path / "000009.tar").write_bytes(b"no tar" * 500)
    shards = tars(tmp_path)
    for slot in range(num_slots):
        where = {"slot": slot, "num_slots": num_slots, "num_epochs": 3}
        whole = list(shards.samples(0, **where))
        for number, one in enumerate(whole):
            assert list(shards.samples(0, start=one.position, **where)) == whole[number:]
    assert list(shards.samples(0, start=Position(0, 99), num_epochs=1)) == [
        one for one in shards.samples(0, num_epochs=1) if one.position.unit > 0
    ]


def test_samples_are_those_that_the_shards_hold_when_they_are_listed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "0.tar", {"1": {"png": b"x", "json": {"question": "What?", "answer": "a"}}})
    write_shard(tmp_path / "a" / "1.tar", {"x/2": {"wav": b"x", "txt": b"what is said"}})
    for source in (tmp_path / "a", tmp_path / "a" / "0.tar"):
        listed = read_data(source, None, ReaderConfig(format="webdataset"))
        streamed = [one.sample for one in tars(source).samples(0, num_epochs=1)]
        assert sorted(streamed, key=str) == sorted(listed, key=str)


def write_saved(folder: Path) -> None:
    """Write tables of images and questions, in the form that `datasets` (5.2.0) saves: arrow by split, and parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    features = {"image": {"_type": "Image"}, "question": {"dtype": "string", "_type": "Value"}}
    notes = {"huggingface": json.dumps({"info": {"features": {**features, "answer": features["question"]}}})}
    (folder / "saved" / "train").mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "tables").mkdir()
    for number in range(2):
        rows = [
            {"image": {"bytes": b"image %d" % row, "path": None}, "question": f"which {number}?", "answer": str(row)}
            for row in range(5)
        ]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(notes)
        name = f"{number:05d}-of-00002"
        parquet.write_table(table, folder / "tables" / f"train-{name}.parquet", row_group_size=2)
        with ipc.new_stream(folder / "saved" / "train" / f"data-{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]}
    (folder / "saved" / "train" / "state.json").write_text(json.dumps({**state, "_split": "train"}))


@pytest.mark.parametrize(
    ("form", "source"), [("datasets", "saved"), ("datasets", "tables"), ("parquet", "tables/train-{00000..00001}*")]
)
def test_tables_are_streams_as_well(tmp_path: Path, form: Format, source: str) -> None:
    write_saved(tmp_path)
    reader = ReaderConfig(format=form)
    listed = read_data(tmp_path / source.partition("/")[0], None, reader)
    shards = Shards.of([f"{tmp_path}/{source}"], None, reader)
    whole = list(shards.samples(0, num_epochs=1))
    assert sorted([one.sample for one in whole], key=str) == sorted(listed, key=str)
    assert len(whole) == 10
    for number, one in enumerate(whole):
        assert list(shards.samples(0, start=one.position, num_epochs=1)) == whole[number:]
    parts = [one.sample for slot in range(4) for one in shards.samples(0, slot=slot, num_slots=4, num_epochs=1)]
    assert sorted(parts, key=str) == sorted(listed, key=str)


def test_bad_samples_come_with_their_shard_and_key_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar",
        {
            "1": {"json": {"question": "a", "answer": "b"}},
            "2": {"json": b"{"},
            "3": {"json": {"question": "a"}, "pkl": b"x"},
            "4": {"json": {"question": "a", "answer": "b"}},
        },
    )
    cut = write_shard(tmp_path / "1.tar", {"5": {"txt": b"x" * 5000, "png": b"x" * 9000}, "6": {"png": b"x" * 9000}})
    cut.write_bytes(cut.read_bytes()[:20_000])
    gone = tmp_path / "2.tar"
    gone.write_bytes(b"")
    shards = tars(tmp_path)
    gone.unlink()
    read = list(shards.samples(0, num_epochs=1))
    bad = {one.sample.sample_id: one.sample for one in read if isinstance(one.sample, SkippedSample)}
    assert {name_of(one) for one in read} - bad.keys() == {"1", "4", "5"}
    assert bad.keys() == {"2", "3", "1.tar", "2.tar"}
    assert bad["3"].path == str(tmp_path / "0.tar")
    assert bad["3"].reason.startswith(f"{tmp_path / '0.tar'}: 3: 3.pkl is a pickle, which could run code")
    assert "unexpected end of data" in bad["1.tar"].reason
    assert "No such file" in bad["2.tar"].reason


def test_tars_are_whole_that_python_gnu_tar_and_webdataset_write(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("what is said")
    (tmp_path / "1.png").write_bytes(b"x" * 700)
    for form in ("ustar", "gnu", "pax"):
        for factor in (1, 20):
            name = tmp_path / "tars" / f"{form}-{factor}.tar"
            name.parent.mkdir(exist_ok=True)
            command = ["tar", f"--format={form}", f"--blocking-factor={factor}", "-cf", str(name), "1.txt", "1.png"]
            subprocess.run(command, cwd=tmp_path, check=True)
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / "tars" / f"python-{number}.tar", "w", format=form) as tar:
            tar.add(tmp_path / "1.txt", "1.txt")
            tar.add(tmp_path / "1.png", "1.png")
    write_shard(tmp_path / "tars" / "webdataset.tar", {"1": {"txt": b"what is said", "png": b"x" * 700}})
    with tarfile.open(tmp_path / "tars" / "empty.tar", "w"):
        pass
    lone = (tmp_path / "tars" / "gnu-1.tar").read_bytes()[:-512]  # one block of the end, as GNU tar takes it
    (tmp_path / "tars" / "lone.tar").write_bytes(lone)
    read = list(tars(tmp_path / "tars").samples(0, num_epochs=1))
    assert [name_of(one) for one in read] == ["1"] * 11
    assert all(isinstance(one.sample, Sample) for one in read)


def test_a_tar_that_is_cut_anywhere_is_named_as_such(tmp_path: Path) -> None:
    rows = {str(number): {"txt": b"said", "png": b"x" * 300} for number in range(3)}
    whole = write_shard(tmp_path / "whole.tar", rows).read_bytes()
    end = (len(whole.rstrip(b"\0")) + 511) // 512 * 512  # of the last member; two blocks of zeros and more follow
    for size in range(512, end + 512, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        *before, last = tars(tmp_path / "cut.tar").samples(0, num_epochs=1)
        assert isinstance(last.sample, SkippedSample), size
        assert last.sample.sample_id == "cut.tar"
        assert f"{tmp_path}/cut.tar: the rest of it is left out: " in last.sample.reason
        # A sample of which a member may be missing is not taken for one.
        assert [name_of(one) for one in before] == [str(number) for number in range(len(before))]
        assert all(isinstance(one.sample, Sample) and len(one.sample.media) == 1 for one in before)
        with pytest.raises(ValueError, match=r"cut\.tar: .*(cut at byte|end of data|header)"):
            read_data(tmp_path / "cut.tar", None, ReaderConfig(format="webdataset"))
    for size in (end + 512, end + 1024):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        assert [name_of(one) for one in tars(tmp_path / "cut.tar").samples(0, num_epochs=1)] == ["0", "1", "2"]
    (tmp_path / "cut.tar").write_bytes(whole[:end] + b"\xff" * 512 + whole[end:])
    (*_, last) = tars(tmp_path / "cut.tar").samples(0, num_epochs=1)
    assert isinstance(last.sample, SkippedSample)
    assert f"the tar is damaged at byte {end}" in last.sample.reason


def test_names_and_patterns_of_shards(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b/x.tar", "b/[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(pattern: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in shard_files(f"{tmp_path}/{pattern}")]

    assert names("a-{08..10}.tar") == names("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{a-09,a-08,b/x}.tar") == ["a-09.tar", "a-08.tar", "b/x.tar"]
    assert names("a-{09..10}.tar") == ["a-09.tar", "a-10.tar"]
    assert names("{b,b}/[1].tar")[:1] == names("b/[1].tar") == ["b/[1].tar"]
    assert [Path(shard.name).name for shard in tars(tmp_path).shards] == [
        "a-08.tar",
        "a-09.tar",
        "a-10.tar",
        "[1].tar",
        "x.tar",
    ]
    with pytest.raises(FileNotFoundError, match=r"there is no such shard:\n.*/a-07.tar\n.*/a-11.tar$"):
        names("a-{07..11}.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard:\n.*/c-\*.tar$"):
        names("c-*.tar")
    with pytest.raises(ValueError, match="stands for more than 1000000 names"):
        names("{0..9999999}.tar")
    with pytest.raises(ValueError, match="holds braces inside braces"):
        names("{a-{09,08},b/x}.tar")
    for address in ("https://example.org/{000..009}.tar", "pipe:curl example.org"):
        with pytest.raises(ValueError, match="of the network only data sets of a hub are read"):
            tars(address)
    with pytest.raises(ValueError, match=r"data.train names .*/a-08.tar twice"):
        tars(f"{tmp_path}/a-08.tar", f"{tmp_path}/a-*.tar")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    write_texts(tmp_path, [50, 50])
    shards = tars(tmp_path)
    kept = []
    for count in (100, 400):
        samples = shards.samples(0)
        tracemalloc.start()
        read = Counter(type(one.sample) for one in itertools.islice(samples, count))
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert read == {Sample: count}
    assert kept[1] < kept[0] + 30_000
