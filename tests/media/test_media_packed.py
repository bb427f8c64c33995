"""Media inside tables whose files come and go."""

import os
from pathlib import Path

import pytest

from mllm.media.packed import packed_bytes, packed_location, packed_path


def test_a_table_that_was_deleted_is_let_go_when_the_next_one_is_read(tmp_path: Path) -> None:
    """Otherwise it takes its place on the disk as long as a process has it open."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def read(number: int) -> bytes:
        path = packed_path(str(tmp_path / f"{number}.parquet"), 0, 0)
        location = packed_location(path)
        assert location is not None
        return packed_bytes(path, location, 1000)

    def mapped() -> set[str]:
        maps = Path("/proc/self/maps").read_text()
        return {f"{number}.parquet" for number in range(3) if f"{tmp_path}/{number}.parquet" in maps}

    for number in range(3):
        parquet.write_table(pyarrow.table({"image": [b"%d" % number]}), tmp_path / f"{number}.parquet")
    assert [read(0), read(1)] == [b"0", b"1"]
    assert mapped() == {"0.parquet", "1.parquet"}
    os.unlink(tmp_path / "0.parquet")
    assert read(2) == b"2"
    assert mapped() == {"2.parquet"}
    assert read(1) == b"1"
