"""What preparing promises, on a film of a real face that talks; where MediaPipe is missing, that it says so."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from talking_face import MOUTH, Film, draw_face, openness, write_film

from mllm.cli import main
from mllm.data.check import check_manifest
from mllm.data.manifest import read_manifest
from mllm.lip_crops.clip import ClipJob
from mllm.lip_crops.config import LipCropsConfig
from mllm.lip_crops.recording import SAMPLES_PER_FRAME, align, audio_of, frames_of
from mllm.lip_crops.run import _is_made, _stamp, _work, find_recordings, transcript_of
from mllm.media import MediaError, load_audio, load_video
from mllm.transforms.encoder_inputs import LipTransform

FILMS = {
    "phone": Film(),
    "day/late": Film(seconds=1.2, audio_delay_seconds=0.24, missing=(0.5, 0.65)),
    "day/silent": Film(seconds=1.0, has_audio=False, rotation_degrees=0),
    "two": Film(seconds=1.0, places=(130 + 300j, 350 + 300j), scales=(0.8, 1.0)),
    "border": Film(seconds=0.6, places=(240 + 575j,)),
    "beyond": Film(seconds=0.6, places=(240 + 630j,)),
    "empty": Film(seconds=1.0, missing=(0.0, 9.0)),
    "short": Film(seconds=0.3),
}


def has_mediapipe() -> bool:
    try:
        import mediapipe.python.solutions.face_mesh  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


needs_mediapipe = pytest.mark.skipif(not has_mediapipe(), reason="needs the extra lips")


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films, a transcript, and a file that is none."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "day").mkdir()
    # The other films, and the faces in these, which take seconds to draw, are for finding faces alone.
    films = FILMS
    if not has_mediapipe():
        films = {name: replace(FILMS[name], missing=(0.0, 9.0)) for name in ("phone", "day/late", "day/silent")}
    for name, film in films.items():
        write_film(folder / f"{name}.mp4", film)
    (folder / "phone.txt").write_text("Text:  PLACE BLUE AT F TWO NOW\nConf:  3\n")
    (folder / "bad.MOV").write_bytes(b"no film")
    return folder


@pytest.fixture(scope="session")
def out(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "crops"
    if has_mediapipe():
        assert main(["prepare", "lips", str(raw), "--out", str(folder), "--workers", "2"]) == 1
    return folder


def report(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, (out / "prepare.jsonl").read_text().splitlines())}


def still_crop() -> np.ndarray:
    """The crop of the face itself, upright and at rest, mouth as in the photograph: what every film should show."""
    from PIL import Image

    from mllm.lip_crops.faces import FaceFinder
    from mllm.lip_crops.geometry import crop, crop_path

    large = np.array(draw_face(0).resize((690, 900), Image.Resampling.BICUBIC))
    with FaceFinder() as find:
        (face,) = find(large)
    path = crop_path(face[None, :8], face[None, 8:])
    return crop(large, path.factors[0], path.centres[0])


@needs_mediapipe
def test_every_recording_is_in_the_report_with_what_became_of_it(raw: Path, out: Path) -> None:
    rows = report(out)
    assert set(rows) == {*FILMS, "bad"}
    status, reason = rows["beyond"]["status"], rows["beyond"].pop("reason")
    assert (status, reason.partition("%")[2]) == ("skipped", " of the crops lie beyond the border; 20% are allowed")
    unused = {name: (row["status"], row["reason"]) for name, row in rows.items() if "reason" in row}
    assert unused == {
        "bad": ("failed", "not an MP4, Matroska, WebM, AVI or MPEG video"),
        "empty": ("skipped", "no face was found"),
        "short": ("skipped", "8 frames; at least 12 are asked for"),
    }
    assert rows["phone"]["face_coverage"] == 1
    assert rows["two"]["faces"] == 2
    assert 0.8 < rows["day/late"]["face_coverage"] < 1
    assert 0.2 > rows["border"]["outside_fraction"] > 0.02 > 0 == rows["phone"]["outside_fraction"]
    assert (out / "contact_sheet.png").is_file()
    assert {path.stem for path in (out / "sheets").rglob("*.png")} == {Path(name).name for name in FILMS}


@needs_mediapipe
@pytest.mark.parametrize("name", ["phone", "day/late", "day/silent", "two"])
def test_the_crop_is_upright_at_rest_and_shows_the_mouth(out: Path, name: str) -> None:
    """The head turns by 30 degrees, wanders by 70 pixels and grows by a fifth; only the mouth moves in the crop."""
    video = load_video(out / f"{name}.mp4", frames_per_second=None, gray=True)
    assert video.frames_per_second == 25
    assert video.frames.shape == (round(FILMS[name].seconds * 25), 96, 96)
    start, end = (round(25 * seconds) for seconds in FILMS[name].missing)
    seen = np.delete(np.arange(len(video.frames)), slice(start - 1, end + 1)) if end else np.arange(len(video.frames))
    still, face = still_crop().mean(axis=-1), np.ones((96, 96), dtype=bool)
    face[20:76, 16:80] = False  # the mouth, which moves
    face[:, :12] = face[:, 84:] = face[84:] = False  # what is behind the head
    errors = np.abs(video.frames[seen] - still)[:, face].mean(axis=1)
    assert errors.mean() < 9
    assert np.abs(video.frames[seen] - video.frames[seen].mean(axis=0))[:, face].mean() < 5
    dark = -video.frames[:, 40:60, 34:62].mean(axis=(1, 2))
    wanted = [openness(number / 25) for number in range(len(dark))]
    assert np.corrcoef(dark[seen], np.array(wanted)[seen])[0, 1] > 0.93


@needs_mediapipe
@pytest.mark.parametrize("name", ["phone", "day/late", "two"])
def test_the_audio_is_16_khz_and_keeps_time_with_the_mouth(out: Path, name: str) -> None:
    audio, frames = load_audio(out / f"{name}.wav"), load_video(out / f"{name}.mp4", gray=True).frames
    assert len(audio.samples) == len(frames) * SAMPLES_PER_FRAME
    loudness = np.sqrt(np.square(audio.samples).reshape(len(frames), -1).mean(axis=1))
    middles = [openness((number + 0.5) / 25) for number in range(len(frames))]
    heard = np.arange(len(frames)) > FILMS[name].audio_delay_seconds * 25 + 1
    assert np.corrcoef(loudness[heard], np.array(middles)[heard])[0, 1] > 0.97
    row = report(out)[name]
    assert row["audio_offset_seconds"] == pytest.approx(FILMS[name].audio_delay_seconds, abs=0.03)


@needs_mediapipe
@pytest.mark.parametrize("width", [40, 60, 200])
def test_far_faces_are_found_as_near_ones(width: int) -> None:
    """40 pixels of 1280 are a person across a street; the face is 85 pixels wide in the photograph."""
    from PIL import Image

    from mllm.lip_crops.faces import FaceFinder

    face, scale = draw_face(0), width / 85
    frame = Image.new("RGB", (1280, 720), (96, 110, 128))
    small = face.resize((round(face.width * scale), round(face.height * scale)), Image.Resampling.LANCZOS)
    frame.paste(small, (700, 300))
    with FaceFinder() as find:
        (points,) = find(np.array(frame))
    assert abs(points[8:].mean() - (700 + 300j + MOUTH * scale)) < 0.1 * width


@needs_mediapipe
def test_a_silent_recording_gives_a_crop_alone(out: Path) -> None:
    assert report(out)["day/silent"]["audio"] is False
    assert not (out / "day/silent.wav").exists()


@needs_mediapipe
def test_clips_with_a_transcript_are_in_a_manifest_that_evaluation_reads(out: Path) -> None:
    samples = read_manifest(out / "manifest.jsonl", out)
    assert [sample.id for sample in samples] == ["phone-asr", "phone-vsr", "phone-avsr"]
    assert {sample.messages[-1].text for sample in samples} == {"PLACE BLUE AT F TWO NOW"}
    assert check_manifest(out / "manifest.jsonl", out, open_media=True).is_good


@needs_mediapipe
def test_the_lip_pipeline_takes_the_crops(out: Path) -> None:
    values, length = LipTransform(size=None, crop_size=88)(load_video(out / "phone.mp4", gray=True))
    assert (tuple(values.shape), length) == ((50, 1, 88, 88), 50)
    assert abs(float(values.mean())) < 2


@needs_mediapipe
def test_a_model_answers_about_a_prepared_clip(out: Path, tmp_path: Path, capsys) -> None:
    import tiny

    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.model.trainables import set_trainables

    model, processor = build(tiny.settings_on(tiny.write_parts(tmp_path / "parts"), media=("audio", "video")))
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    words = ["generate", "--model", str(tmp_path / "run"), "--max-new-tokens", "3", "--budget", "audio=/8,video=/5"]
    files = ["--video", str(out / "two.mp4"), "--audio", str(out / "two.wav")]
    assert main([*words, *files]) == 0
    assert "video 5;" in capsys.readouterr().err


@needs_mediapipe
def test_done_clips_are_left_alone_and_changed_wishes_are_not(raw: Path, tmp_path: Path, capsys) -> None:
    words = ["prepare", "lips", str(raw / "two.mp4"), "--out", str(tmp_path)]
    assert main(words) == 0
    assert "1 done, 0 skipped, 0 failed; 1 of them now" in capsys.readouterr().out
    gray = (tmp_path / "two.mp4").read_bytes()
    first = load_video(tmp_path / "two.mp4").frames
    with open(tmp_path / "prepare.jsonl", "a") as interrupted:
        interrupted.write('{"id": "thr')
    assert main(words) == 0
    assert "1 done, 0 skipped, 0 failed; 0 of them now" in capsys.readouterr().out
    assert (tmp_path / "two.mp4").read_bytes() == gray
    assert main([*words, "--face", "left", "--color"]) == 0
    shown = capsys.readouterr().out
    assert "; 1 of them now" in shown
    assert "look at " in shown
    other = load_video(tmp_path / "two.mp4").frames
    assert np.ptp(other, axis=-1).max() > 30 > np.ptp(first, axis=-1).max()
    assert main([*words, "--face", "2", "--sheet_clips", "0"]) == 1
    shown = capsys.readouterr().out
    assert "face 2 was asked for; there are 2, counted from 0 at the left" in shown
    assert "look at " not in shown
    assert not (tmp_path / "two.mp4").exists()


@needs_mediapipe
def test_one_folder_holds_clips_of_several_runs_but_not_two_of_one_name(raw: Path, tmp_path: Path, capsys) -> None:
    assert main(["prepare", "lips", str(raw / "two.mp4"), "--out", str(tmp_path / "out")]) == 0
    assert main(["prepare", "lips", str(raw / "day" / "silent.mp4"), "--out", str(tmp_path / "out")]) == 0
    assert set(report(tmp_path / "out")) == {"two", "silent"}
    (tmp_path / "two.mp4").write_bytes((raw / "two.mp4").read_bytes())
    assert main(["prepare", "lips", str(tmp_path / "two.mp4"), "--out", str(tmp_path / "out")]) == 2
    assert "already holds two.mp4, cut out of" in capsys.readouterr().err


def test_without_mediapipe_the_pip_line_is_told(raw: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    assert main(["prepare", "lips", str(raw), "--out", str(tmp_path)]) == 2
    assert "pip install -e '.[lips]'" in capsys.readouterr().err


def test_a_worker_that_dies_is_told_and_what_it_said_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mllm.lip_crops.run.prepare_clip", os._exit)
    with pytest.raises(OSError, match=r"a worker ended without an answer, see .*prepare\.log; run again"):
        list(_work([9], 1, tmp_path / "prepare.log"))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "prepare.log").is_file()


def test_frames_are_upright_25_a_second_and_at_their_time(raw: Path) -> None:
    frames = list(frames_of(raw / "phone.mp4"))
    assert len(frames) == 50
    assert frames[0].shape == (640, 480, 3)


def test_audio_lasts_as_long_as_the_frames(raw: Path) -> None:
    late = audio_of(raw / "day/late.mp4", 30)
    assert late is not None
    assert late.samples.shape == (30 * SAMPLES_PER_FRAME,)
    assert late.offset_seconds == pytest.approx(0.24, abs=0.03)
    assert not late.samples[: round(0.2 * 16_000)].any()
    assert audio_of(raw / "day/silent.mp4", 25) is None


@pytest.mark.parametrize(
    ("offset", "wanted", "silent"),
    [
        (0.0, [1, 2, 3, 4], 0),
        (2 / 16_000, [0, 0, 1, 2], 2),
        (-3 / 16_000, [4, 5, 6, 0], 1),
        (9.0, [0, 0, 0, 0], 4),
        (-9.0, [0, 0, 0, 0], 4),
    ],
)
def test_audio_is_put_where_it_belongs(offset: float, wanted: list[int], silent: int, monkeypatch) -> None:
    monkeypatch.setattr("mllm.lip_crops.recording.SAMPLES_PER_FRAME", 4)
    aligned = align(np.arange(1, 7, dtype=np.float32), offset, 1)
    assert aligned.samples.tolist() == wanted
    assert aligned.silent_seconds == pytest.approx(silent / 16_000)


def test_recordings_are_found_with_all_below_but_not_what_was_made_of_them(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.MKV", "a/d.webm", "note.txt", "out/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    recordings = find_recordings(tmp_path, tmp_path / "out")
    assert [name for name, _ in recordings] == ["a/c", "a/d", "b"]
    assert find_recordings(tmp_path / "b.mp4", tmp_path / "out") == [("b", tmp_path / "b.mp4")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no recording; looked for .mp4"),
        (lambda folder: [(folder / name).write_bytes(b"x") for name in ("a.mp4", "a.mov")], "would both become a.mp4"),
        (lambda folder: (folder / " a.mp4").write_bytes(b"x"), "cannot stand in a manifest: .* blank; rename it"),
    ],
)
def test_folders_that_cannot_be_prepared_are_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_recordings(tmp_path, tmp_path / "out")


def test_recordings_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    for source in (tmp_path, tmp_path / "a.mp4"):
        with pytest.raises(ValueError, match="crops would overwrite them"):
            find_recordings(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        find_recordings(tmp_path / "none", tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [("Text:  HELLO THERE\n\nWORD START END\n", "HELLO THERE"), ("hello\n there \n", "hello there"), ("", "")],
)
def test_transcripts_are_read_as_lrs_writes_them_or_whole(tmp_path: Path, content: str, text: str) -> None:
    assert transcript_of(tmp_path / "a.mp4") == ""
    (tmp_path / "a.txt").write_text(content)
    assert transcript_of(tmp_path / "a.mp4") == text
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        transcript_of(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"face": "biggest"}, "face must be largest, left, right or a number from 0, got 'biggest'"),
        ({"face": "-1"}, "got '-1'"),
        ({"min_face_coverage": 0.0}, "min_face_coverage must be above 0 and at most 1, got 0.0"),
        ({"max_outside": 2.0}, "max_outside must be 0 to 1, got 2.0"),
        ({"min_frames": 0}, "min_frames must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"sheet_clips": -1}, "sheet_clips must be at least 0, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LipCropsConfig(source="a", out="b", **changes)


def test_a_recording_may_be_as_long_as_is_asked_for(raw: Path) -> None:
    with pytest.raises(MediaError, match=r"longer than 0\.5 seconds"):
        list(frames_of(raw / "phone.mp4", max_seconds=0.5))
    assert len(list(frames_of(raw / "phone.mp4", max_seconds=5000))) == len(list(frames_of(raw / "phone.mp4")))
    with pytest.raises(ValueError, match="max_seconds must be above 0, got 0"):
        LipCropsConfig(source="a", out="b", max_seconds=0)


def test_too_long_is_said_of_the_setting_that_the_command_has(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"the video is longer than 0\.5 seconds \(max_seconds\) \(limit\)"):
        list(frames_of(raw / "phone.mp4", max_seconds=0.5))
    path = tmp_path / "long_audio.mp4"
    with av.open(path, "w") as container:
        images, audio = container.add_stream("mpeg4", rate=25), container.add_stream("aac", rate=16_000)
        images.width = images.height = 16
        images.pix_fmt = "yuv420p"
        for _ in range(5):
            container.mux(images.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(images.encode())
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 11 * 16_000), np.float32), format="fltp", layout="mono")
        heard.sample_rate = 16_000
        container.mux(audio.encode(heard))
        container.mux(audio.encode())
    message = r"the audio is longer than 0\.5 seconds \(max_seconds\) and 10 more \(limit\)"
    with pytest.raises(MediaError, match=message) as caught:
        audio_of(path, 5, max_seconds=0.5)
    assert pickle.loads(pickle.dumps(caught.value)).limit == caught.value.limit == "audio_seconds"
    assert audio_of(path, 5, max_seconds=1.5) is not None
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(MediaError, match=r"the file is empty \(empty\)"):
        list(frames_of(tmp_path / "empty.mp4"))


@pytest.mark.parametrize("status", ["done", "skipped"])
def test_what_is_longer_than_is_allowed_now_is_prepared_again(tmp_path: Path, status: str) -> None:
    (tmp_path / "a.mov").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_bytes(b"x")
    made = {}
    for max_seconds in (120.0, 3.0, 2.0, 1.9):
        settings = LipCropsConfig(source=str(tmp_path), out=str(tmp_path / "out"), max_seconds=max_seconds)
        job = ClipJob("a", tmp_path / "a.mov", tmp_path / "out", settings, is_shown=False)
        row = {"id": "a", "status": status, "seconds": 2.0, "audio": False, **_stamp(job)}
        made[max_seconds] = _is_made(job, row)
    assert made == {120.0: True, 3.0: True, 2.0: True, 1.9: False}
