"""resolve_media: a path from a manifest opens regular files under the root and nothing else."""

import os
from pathlib import Path

import pytest

from mllm.media import MediaError, path_problem, resolve_media


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write a root with a file, a folder, good and bad links and a FIFO; a secret stands beside it."""
    root = tmp_path / "root"
    (root / "clips").mkdir(parents=True)
    (tmp_path / "secret.wav").write_text("secret")
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "a.wav").write_text("secret")
    (root / "clips" / "a.wav").write_text("good")
    (root / "clips" / "ünï code.wav").write_text("good")
    (root / "inside.wav").symlink_to("clips/a.wav")
    (root / "again").symlink_to("clips")
    (root / "out.wav").symlink_to(tmp_path / "secret.wav")
    (root / "twin").symlink_to(tmp_path / "root-twin")
    (root / "up").symlink_to("..")
    (root / "proc").symlink_to("/proc/self")
    (root / "null.wav").symlink_to("/dev/null")
    (root / "loop.wav").symlink_to("loop.wav")
    (root / "dead.wav").symlink_to("nowhere.wav")
    os.mkfifo(root / "pipe.wav")
    return root


@pytest.mark.parametrize("relative", ["clips/a.wav", "inside.wav", "again/a.wav", "clips/ünï code.wav"])
def test_regular_files_under_the_root(root: Path, relative: str) -> None:
    path = resolve_media(root, relative)
    assert path.read_text() == "good"
    assert path == (root / relative).resolve()


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert resolve_media(tmp_path / "link", "clips/a.wav").read_text() == "good"


@pytest.mark.parametrize(
    "relative",
    [
        *["", " ", "/", "/etc/passwd", "//etc/passwd", "~/a.wav", "~root/a.wav", "..", "../secret.wav"],
        *["clips/../../secret.wav", "clips/../clips/a.wav", "./clips/a.wav", "clips//a.wav", "clips/", "clips/."],
        *["..\\secret.wav", "clips\\a.wav", "C:/a.wav", "c:a.wav", "file:///etc/passwd", "http://host/a.wav"],
        *["concat://a|b", "a\0.wav", "a\n.wav", "clips/a.wav ", " clips/a.wav", "\u202ea.wav", "a\u2028b"],
        *["out.wav", "twin/a.wav", "up/secret.wav", "up/root/clips/a.wav/../../../secret.wav"],
        *["proc/environ", "proc/root/etc/passwd", "null.wav", "loop.wav", "pipe.wav", "clips", "again"],
        *["a" * 5_000, "clips/" + "b" * 300],
    ],
)
def test_everything_else_is_refused(root: Path, relative: str) -> None:
    with pytest.raises(MediaError, match="refused") as caught:
        resolve_media(root, relative)
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("relative", ["no.wav", "nowhere/a.wav", "clips/a.wav/b.wav", "dead.wav", "CLIPS/a.wav"])
def test_missing_files(root: Path, relative: str) -> None:
    with pytest.raises(MediaError, match="no such file") as caught:
        resolve_media(root, relative)
    assert caught.value.kind == "missing"


def test_a_link_that_is_turned_around_later_is_seen(root: Path, tmp_path: Path) -> None:
    assert resolve_media(root, "clips/a.wav").read_text() == "good"
    (root / "clips" / "a.wav").unlink()
    (root / "clips" / "a.wav").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(MediaError, match="out of the root"):
        resolve_media(root, "clips/a.wav")
    (root / "clips").rename(root / "old")
    (root / "clips").symlink_to(tmp_path / "root-twin")
    with pytest.raises(MediaError, match="out of the root"):
        resolve_media(root, "clips/a.wav")


def test_path_problem_names_the_rule() -> None:
    assert path_problem("a/b.wav") is None
    assert "relative to the root" in str(path_problem("/a"))
    assert "'..'" in str(path_problem("a/../b"))
