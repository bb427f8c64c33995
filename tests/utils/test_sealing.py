"""A sealed folder tells whatever happens to its files, its manifest included."""

import json
import random
from pathlib import Path

import pytest

from mllm.utils.sealing import (
    MANIFEST,
    check_before_load,
    check_files,
    files_below,
    find_problems,
    read_manifest,
    renew_seal,
    seal_folder,
    unchecked,
)

FACTS = {"step": 3, "facts": {"rates": [0.1, 1e-9], "name": "größe"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "inner" / "config.json").write_text("{}")
    seal_folder(tmp_path, files_below(tmp_path), FACTS)
    return tmp_path


def test_facts_come_back_and_nothing_is_wrong(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert set(manifest["files"]) == {"weights", "inner/config.json"}
    check_files(folder, manifest["files"])
    check_before_load(folder)
    assert find_problems(folder) == []


def test_every_changed_byte_of_a_manifest_is_found_or_means_the_same(folder: Path) -> None:
    whole, manifest, rng = (folder / MANIFEST).read_bytes(), read_manifest(folder), random.Random(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        (folder / MANIFEST).write_bytes(damaged)
        try:
            read = read_manifest(folder)
        except ValueError as error:
            problem = str(error)
        else:
            assert read == manifest  # a blank that became another one
            continue
        assert problem.startswith((f"{folder} is damaged: {MANIFEST}", f"{folder} is incomplete: {MANIFEST}"))


@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "null", "[]", "{}", '{"files": {}}', '{"sha256": "0"}'])
def test_a_manifest_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=rf"^{folder} is (incomplete|damaged): {MANIFEST} "):
        read_manifest(folder)


def test_a_file_that_is_cut_changed_or_gone_is_named(folder: Path) -> None:
    weights, whole = folder / "weights", (folder / "weights").read_bytes()
    for content in (whole[:-1], whole[:-1] + b"x", whole + b"x"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is damaged: weights has .*; `mllm check {folder}` lists"):
            check_before_load(folder)
        with unchecked():
            check_before_load(folder)
    weights.unlink()
    (folder / "inner" / "config.json").write_text("{ }")
    assert [problem.split(": ", 1)[1].split(" has")[0] for problem in find_problems(folder)] == [
        "inner/config.json",
        "weights is missing",
    ]


def test_a_seal_is_renewed_for_the_files_that_were_replaced(folder: Path) -> None:
    (folder / "inner" / "config.json").write_text('{"new": 1}')
    renew_seal(folder, ["inner/config.json"])
    assert find_problems(folder) == []
    assert read_manifest(folder)["step"] == 3


def test_a_name_outside_of_the_folder_is_never_read(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in ("/etc/hostname", "../x"):
        with pytest.raises(ValueError, match="which is no file in it"):
            check_files(folder, {name: manifest["files"]["weights"]})
