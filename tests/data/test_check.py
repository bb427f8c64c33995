"""check_manifest finds every problem of a manifest in one pass, with its line."""

import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from mllm.data.check import check_manifest
from mllm.media import write_video


def row(name: str, *media: tuple[str, str], task: str = "vqa") -> bytes:
    """Return a good row with media."""
    parts = [{"type": medium, "path": path} for medium, path in media] + [{"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]
    return json.dumps({"id": name, "task": task, "messages": messages}).encode()


def corpus(folder: Path, *rows: bytes) -> Path:
    """Write a folder with an image, audio of two seconds, broken audio, and a manifest."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    soundfile.write(folder / "a.wav", np.full(32_000, 0.1), 16_000)
    (folder / "broken.wav").write_bytes((folder / "a.wav").read_bytes()[:999])
    (folder / "out.png").symlink_to("/etc/passwd")
    (folder / "m.jsonl").write_bytes(b"\n".join(rows))
    return folder / "m.jsonl"


def test_a_good_manifest_is_counted(tmp_path: Path) -> None:
    rows = [row("a", ("image", "a.png"), ("audio", "a.wav")), b"", row("b", ("audio", "a.wav"), task="asr"), row("c")]
    path = corpus(tmp_path, *rows)
    report = check_manifest(path, tmp_path, open_media=False)
    assert report.is_good
    assert (report.num_rows, report.num_samples) == (3, 3)
    assert dict(report.media) == {"image": 1, "audio": 2}
    assert dict(report.tasks) == {"vqa": 2, "asr": 1}
    assert report.summary().splitlines()[1:] == ["tasks: asr 1, vqa 2", "media: image 1, audio 2", "no problems"]
    opened = check_manifest(path, tmp_path, open_media=True)
    assert opened.seconds == {"image": 0.0, "audio": 4.0, "video": 0.0}
    assert "audio 2 (4.0 seconds)" in opened.summary()


def test_every_problem_is_reported_with_its_line(tmp_path: Path) -> None:
    path = corpus(
        tmp_path,
        row("a", ("image", "no.png"), ("image", "out.png"), ("image", "a.png")),
        b"{",
        row("b", ("audio", "broken.wav")),
        row("b"),
        b'{"id": "c", "task": "vqa", "messages": [], "extra": 1}',
        row("d", ("image", "a.wav")),
    )
    report = check_manifest(path, tmp_path, open_media=False)
    assert [problem.line_number for problem in report.problems] == [1, 1, 2, 4, 5, 5]
    messages = [problem.message for problem in report.problems]
    assert "no.png: there is no such file" in messages[0]
    assert "out.png: the path leads out of the root" in messages[1]
    assert "id: 'b' was already used on line 3" in messages[3]
    assert (report.num_rows, report.num_samples, report.is_good) == (6, 2, False)
    assert report.summary().endswith("problems: 6 on 4 lines")

    opened = check_manifest(path, tmp_path, open_media=True)
    result = {problem.line_number: problem.message for problem in opened.problems}
    assert "audio broken.wav: the file is shorter than its header states (corrupt)" in result[3]
    assert "image a.wav: not an image" in result[6]
    assert opened.num_samples == 0


def test_a_manifest_without_rows_is_a_problem(tmp_path: Path) -> None:
    report = check_manifest(corpus(tmp_path), tmp_path, open_media=False)
    assert not report.is_good
    assert report.problems[0].message == "the manifest holds no sample"


def test_a_thousand_hostile_rows_in_one_pass(tmp_path: Path) -> None:
    hostile = [b"[", b"\xff", b"{}", b"null", b'{"id": []}', b"\0", b'"', row("x", ("image", "../x"))] * 125
    lines = [line for number, bad in enumerate(hostile) for line in (row(f"g{number}"), bad)]
    report = check_manifest(corpus(tmp_path, *lines), tmp_path, open_media=False)
    assert report.num_samples == 1_000
    assert {problem.line_number for problem in report.problems} == set(range(2, 2_001, 2))


def test_opening_compares_the_audio_and_the_video_of_a_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((50, 16, 16), np.uint8))
    write_video(tmp_path / "short.mp4", np.zeros((40, 16, 16), np.uint8))
    path = corpus(tmp_path, row("a", ("audio", "a.wav"), ("video", "a.mp4"), task="avsr"))
    (tmp_path / "short.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    path.write_bytes(path.read_bytes() + b"\n" + row("b", ("audio", "short.wav"), ("video", "short.mp4"), task="avsr"))
    assert check_manifest(path, tmp_path, open_media=False).is_good
    report = check_manifest(path, tmp_path, open_media=True)
    assert [problem.line_number for problem in report.problems] == [2]
    assert "audio short.wav: the audio lasts 2.000 seconds and the video" in report.problems[0].message
    assert report.seconds == {"image": 0.0, "audio": 2.0, "video": 2.0}
