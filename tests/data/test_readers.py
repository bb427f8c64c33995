"""Lists and trees of speech clips become the samples their formats mean; whatever is wrong is told with its line."""

import json
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
import soundfile

from mllm.cli import main
from mllm.config.data import BENCHMARK_FORMATS, CONVERSATION_FORMATS, SPEECH_FORMATS, Format, ReaderConfig
from mllm.data.findings import Listing
from mllm.data.json_lines import MAX_LINE_BYTES
from mllm.data.llava import read_llava
from mllm.data.manifest import Media, read_manifest, write_manifest
from mllm.data.readers import READERS, read_data
from mllm.data.speech.lrs import Word, parse_text, plan_segments, read_lrs
from mllm.data.speech.segmenting import Cutter
from mllm.evaluation.work_list import references_of
from mllm.media import load_audio, load_video, write_audio, write_video

PRETRAIN = """Text:  ONE TWO {NS} THREE
Conf:  4

WORD START END ASDSCORE
ONE 0.20 0.50 5.1
TWO 0.60 0.96 4.0
{NS} 1.20 1.40 3.0
THREE 1.50 1.80 9.9
"""


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def listing_of(form: Format, source: Path, root: Path, **settings) -> Listing:
    return READERS[form](source, root, ReaderConfig(format=form, **settings))


def said(listing: Listing) -> dict[str, str]:
    return {sample.id: sample.messages[-1].text for sample in listing.samples}


def clip(path: Path, *, num_frames: int, rate_hz: int = 16_000, with_audio: bool = True) -> None:
    """Write a video whose frames brighten by 3 with each, and audio beside it that rises with time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.arange(num_frames, dtype=np.uint8) * 3 + 10
    write_video(path, np.broadcast_to(levels[:, None, None], (num_frames, 16, 16)).copy())
    if with_audio:
        write_audio(path.with_suffix(".wav"), np.linspace(0, 0.9, num_frames * rate_hz // 25), sample_rate_hz=rate_hz)


def talking_clip(path: Path) -> None:
    """Write a video with an audio stream of its own, 0.2 seconds long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        images, audio = container.add_stream("mpeg4", rate=25), container.add_stream("aac", rate=16_000)
        images.width = images.height = 16
        images.pix_fmt = "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            container.mux(images.encode(frame))
        container.mux(images.encode())
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 3200), np.float32), format="fltp", layout="mono")
        heard.sample_rate = 16_000
        container.mux(audio.encode(heard))
        container.mux(audio.encode())


def test_every_format_of_the_settings_has_a_reader() -> None:
    assert tuple(READERS) == get_args(Format)
    assert set(SPEECH_FORMATS) == set(READERS) - {"manifest", *CONVERSATION_FORMATS, *BENCHMARK_FORMATS}


def test_commas_and_quotes_in_the_text_are_text(tmp_path: Path) -> None:
    touch(tmp_path, *(f"lrs3/t/{n}.mp4" for n in range(6)))
    rows = [
        "lrs3,t/0.mp4,50,1 2,well, yes, that is so",
        'lrs3,t/1.mp4,50,,"quoted, as ""CSV"" writers do"',
        'lrs3,t/2.mp4,50,1,"so" he said "yes"',
        "lrs3,t/3.mp4,50,1,ends in a comma,",
        '"lrs3","t/4.mp4","50","1 2",plain',
        "lrs3,t/5.mp4,50,1,caf\u00e9\u2028still one row",
    ]
    (tmp_path / "l.csv").write_bytes("\ufeff".encode() + "\r\n".join(rows).encode())
    listing = listing_of("omni_csv", tmp_path / "l.csv", tmp_path, tasks=["vsr"])
    assert not listing.problems
    assert list(said(listing).values()) == [
        "well, yes, that is so",
        'quoted, as "CSV" writers do',
        '"so" he said "yes"',
        "ends in a comma,",
        "plain",
        "caf\u00e9 still one row",
    ]
    assert listing.samples[0].meta == {"seconds": 2.0}


def test_a_clip_is_three_samples_in_the_words_of_the_published_systems(tmp_path: Path) -> None:
    touch(tmp_path, "lrs3/a/1.mp4", "lrs3/a/1.wav")
    talking_clip(tmp_path / "lrs3/a/2.mp4")
    (tmp_path / "l.csv").write_text("lrs3,a/1.mp4,25,0,HELLO There\nlrs3,a/2.mp4,25,0,x\n")
    listing = listing_of("omni_csv", tmp_path / "l.csv", tmp_path, text="lower")
    asr, vsr, avsr, second_asr = listing.samples[:4]
    audio, video = Media("audio", "lrs3/a/1.wav"), Media("video", "lrs3/a/1.mp4")
    assert [sample.id for sample in (asr, vsr, avsr)] == ["lrs3/a/1-asr", "lrs3/a/1-vsr", "lrs3/a/1-avsr"]
    assert [sample.task for sample in (asr, vsr, avsr)] == ["asr", "vsr", "avsr"]
    assert [sample.media for sample in (asr, vsr, avsr)] == [(audio,), (video,), (audio, video)]
    assert [sample.messages[0].text for sample in (asr, vsr, avsr)] == [
        "Transcribe speech to text.",
        "Transcribe video to text.",
        "Transcribe speech and video to text.",
    ]
    assert avsr.messages[1].text == "hello there"
    assert second_asr.media == (Media("audio", "lrs3/a/2.mp4"),)  # no audio beside it: the video's own
    mine = listing_of("omni_csv", tmp_path / "l.csv", tmp_path, tasks=["asr"], prompts={"asr": "words?"})
    assert mine.samples[0].messages[0].text == "words?"


def test_every_bad_row_is_reported_with_its_line_and_nothing_leaves_the_root(tmp_path: Path) -> None:
    touch(tmp_path / "root", "d/1.mp4", "d/1.wav")
    touch(tmp_path, "secret.mp4")
    (tmp_path / "root" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    rows = [
        b"d,1.mp4,25,0,fine",
        b"d,1.mp4,25",
        b"d,1.mp4,many,0,x",
        b"d,../../secret.mp4,25,0,x",
        b",/etc/passwd,25,0,x",
        b",link.mp4,25,0,x",
        b"d,1.mp4,25,0,again",
        b"d,2.mp4,25,0,   ",
        b"d,3.mp4,25,0,\xff",
        b'd,4.mp4,25,0,"open',
        b"d,gone.mp4,25,0,missing is listed, not lost",
    ]
    (tmp_path / "l.csv").write_bytes(b"\n".join(rows))
    listing = listing_of("omni_csv", tmp_path / "l.csv", tmp_path / "root")
    lines = {}
    for problem in listing.problems:
        lines.setdefault(problem.line_number, problem.message)
    assert list(lines) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert "n_frames must be a whole number above 0, got 'many'" in lines[3]
    assert "must not hold '..'" in lines[4]
    assert "must be relative to the root" in lines[5]
    assert "leads out of the root by a symbolic link" in lines[6]
    assert "'d/1' was already named at" in lines[7]
    assert lines[7].endswith("l.csv:1")
    assert "the transcript is empty" in lines[8]
    assert "not UTF-8: byte 14 of the line is 0xff" in lines[9]
    assert "is not closed" in lines[10]
    assert [finding.line_number for finding in listing.missing] == [11, 11]  # audio and video
    assert {sample.id for sample in listing.samples} - listing.incomplete == {"d/1-asr", "d/1-vsr", "d/1-avsr"}
    assert listing.incomplete == {"d/gone-asr", "d/gone-vsr", "d/gone-avsr"}


def test_auto_avsr_takes_the_text_from_files(tmp_path: Path) -> None:
    touch(tmp_path, "lrs3/lrs3_video_seg16s/t/1.mp4", "lrs3/lrs3_video_seg16s/t/2.mp4")
    (tmp_path / "lrs3/lrs3_text_seg16s/t").mkdir(parents=True)
    (tmp_path / "lrs3/lrs3_text_seg16s/t/1.txt").write_text("IN THE TREE\n")
    (tmp_path / "lrs3/lrs3_video_seg16s/t/2.txt").write_text("BESIDE")
    (tmp_path / "own").mkdir()
    (tmp_path / "l.csv").write_text(
        "lrs3,lrs3_video_seg16s/t/1.mp4,25,4 8\nlrs3,lrs3_video_seg16s/t/2.mp4,25,7\n"
        "lrs3,lrs3_video_seg16s/t/3.mp4,25,7\nlrs3,lrs3_video_seg16s/t/1.mp4,25,7,a text\n"
    )
    listing = listing_of("auto_avsr", tmp_path / "l.csv", tmp_path, tasks=["vsr"])
    assert list(said(listing).values()) == ["IN THE TREE", "BESIDE"]
    assert [problem.line_number for problem in listing.problems] == [3, 4]
    assert "the list holds no text, and there is none in" in listing.problems[0].message
    assert "omni_csv" in listing.problems[1].message
    elsewhere = listing_of("auto_avsr", tmp_path / "l.csv", tmp_path, tasks=["vsr"], transcripts=str(tmp_path / "own"))
    assert len(elsewhere.problems) == 4


def test_fairseq_rows_wherever_the_list_was_made(tmp_path: Path) -> None:
    touch(tmp_path, "video/a/1.mp4", "audio/a/1.wav")
    row = "a/1\t{0}video/a/1.mp4\t{0}audio/a/1.wav\t50\t32000"
    for base, prefix in (("/", f"{tmp_path}/"), (str(tmp_path), ""), ("/another/machine", "")):
        (tmp_path / "l.tsv").write_text(f"{base}\n{row.format(prefix)}\n")
        (tmp_path / "l.wrd").write_text("hello\n")
        listing = listing_of("fairseq", tmp_path / "l.tsv", tmp_path)
        assert not listing.problems
        assert not listing.missing
        assert listing.samples[2].media == (Media("audio", "audio/a/1.wav"), Media("video", "video/a/1.mp4"))
        assert listing.samples[2].meta == {"seconds": 2.0}
    (tmp_path / "l.tsv").write_text("/\na\t/etc/x.mp4\t/etc/x.wav\t5\t5\nb\tx\n")
    (tmp_path / "l.wrd").write_text("x\ny\n")
    outside = listing_of("fairseq", tmp_path / "l.tsv", tmp_path)
    assert "/etc/x.wav is not under the root" in outside.problems[0].message
    assert outside.problems[1].line_number == 3
    (tmp_path / "l.wrd").write_text("x\n")
    with pytest.raises(ValueError, match=r"l.wrd has 1 lines for 2 clips"):
        listing_of("fairseq", tmp_path / "l.tsv", tmp_path)
    (tmp_path / "h.tsv").write_text(f"{tmp_path}\naudio/a/1.wav\t16000\n")
    (tmp_path / "h.wrd").write_text("only sound\n")
    assert said(listing_of("fairseq", tmp_path / "h.tsv", tmp_path)) == {"audio/a/1-asr": "only sound"}


BLANK = "\u00a0"
"""A blank of Unicode, which is none of ASCII's."""


def test_a_line_that_only_looks_blank_loses_no_text_in_silence(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    rows = [str(tmp_path), "a\ta.mp4\t\t5\t5", BLANK, "b\tb.mp4\t\t5\t5"]
    (tmp_path / "l.tsv").write_text("\n\n".join(rows))
    (tmp_path / "l.wrd").write_text("one\ntwo\nthree\n")
    listing = listing_of("fairseq", tmp_path / "l.tsv", tmp_path)
    assert said(listing) == {"a-vsr": "one", "b-vsr": "three"}
    (finding,) = listing.problems
    assert (finding.line_number, finding.message.partition(",")[0]) == (5, "a row must be id")
    (tmp_path / "test.txt").write_text(f"{BLANK}\n")
    (finding,) = listing_of("lrs", tmp_path / "test.txt", tmp_path).problems
    assert (finding.line_number, finding.message) == (
        1,
        f"the path must not be empty or begin or end with a blank, got {BLANK!r}",
    )


@pytest.mark.parametrize("form", ["omni_csv", "fairseq"])
def test_a_line_longer_than_any_row_is_one_finding(tmp_path: Path, form: Format) -> None:
    touch(tmp_path, "d/1.mp4", "d/2.mp4")
    rows = ["d,{0}.mp4,25,0,text {0}" if form == "omni_csv" else "d/{0}\td/{0}.mp4\t\t25\t16000"] * 2
    lines = [rows[0].format(1), "x" * (MAX_LINE_BYTES + 1), rows[1].format(2)]
    (tmp_path / "l.csv").write_text("\n".join([str(tmp_path)] * (form == "fairseq") + lines))
    (tmp_path / "l.wrd").write_text("text 1\nlost\ntext 2\n")
    listing = listing_of(form, tmp_path / "l.csv", tmp_path, tasks=["vsr"])
    assert said(listing) == {"d/1-vsr": "text 1", "d/2-vsr": "text 2"}
    (finding,) = listing.problems
    assert finding.message == f"the line is longer than {MAX_LINE_BYTES} bytes"


def test_lrs_lists_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "main/s/1.mp4", "main/s/1.wav", "main/s/2.mp4", "lrs3/test/t/1.mp4", "lrs3/test/t/2.mp4")
    for name, text in (
        ("main/s/1", "Text:  HELLO {LG} YOU\nConf: 5\n"),
        ("main/s/2", "no head"),
        ("lrs3/test/t/1", PRETRAIN),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "test.txt").write_text("s/1 NF\ns/2 MV\ns/3 NF\n../x NF\n")
    lrs2 = listing_of("lrs", tmp_path / "test.txt", tmp_path, tasks=["avsr"])
    assert said(lrs2) == {"main/s/1-avsr": "HELLO LG YOU"}
    assert [problem.line_number for problem in lrs2.problems] == [2, 3, 4]
    assert "must begin with 'Text:'" in lrs2.problems[0].message
    assert "there is no transcript" in lrs2.problems[1].message
    lrs3 = listing_of("lrs", tmp_path / "lrs3" / "test", tmp_path, tasks=["vsr"])
    assert said(lrs3) == {"lrs3/test/t/1-vsr": "ONE TWO NS THREE"}
    assert "t/2.txt" in str(lrs3.problems[0])


@pytest.mark.parametrize("form", ["auto_avsr", "omni_csv", "lrs"])
def test_no_audio_is_promised_for_a_clip_that_has_none(tmp_path: Path, form: Format) -> None:
    clip(tmp_path / "d/silent.mp4", num_frames=5, with_audio=False)
    clip(tmp_path / "d/beside.mp4", num_frames=5)
    talking_clip(tmp_path / "d/own.mp4")
    names = ("silent", "beside", "own")
    for name in names:
        (tmp_path / f"d/{name}.txt").write_text("Text: HELLO\n" if form == "lrs" else "hello")
    text = ",hello" if form == "omni_csv" else ""
    (tmp_path / "l.csv").write_text("".join(f"d,{name}.mp4,5,0{text}\n" for name in (*names, "gone")))
    (tmp_path / "d/gone.txt").write_text("hello")  # for the lists, whose missing clips are told with both media
    source = tmp_path / ("d" if form == "lrs" else "l.csv")
    result = listing_of(form, source, tmp_path)
    made = {(sample.id, *(part.path for part in sample.media)) for sample in result.whole}
    assert made == {
        ("d/silent-vsr", "d/silent.mp4"),
        ("d/beside-asr", "d/beside.wav"),
        ("d/beside-vsr", "d/beside.mp4"),
        ("d/beside-avsr", "d/beside.wav", "d/beside.mp4"),
        ("d/own-asr", "d/own.mp4"),
        ("d/own-vsr", "d/own.mp4"),
        ("d/own-avsr", "d/own.mp4", "d/own.mp4"),
    }
    assert not result.problems
    assert len(result.missing) == (0 if form == "lrs" else 2)
    question = listing_of(form, source, tmp_path, tasks=["asr"])
    assert [finding.message for finding in question.problems] == ["d/silent: there is no audio for the task asr"]


def test_a_long_clip_without_audio_is_cut_into_pieces_without_audio(tmp_path: Path) -> None:
    clip(tmp_path / "pretrain/s/1.mp4", num_frames=50, with_audio=False)
    (tmp_path / "pretrain/s/1.txt").write_text(PRETRAIN)
    settings = ReaderConfig(format="lrs", max_seconds=1.0)
    cut = read_lrs(tmp_path / "pretrain", tmp_path, settings, cut=Cutter(tmp_path, "cut"))
    assert said(cut) == {"cut/pretrain/s/1_000-vsr": "ONE TWO", "cut/pretrain/s/1_001-vsr": "NS THREE"}
    assert not cut.problems
    assert not list((tmp_path / "cut").rglob("*.wav"))


def test_long_clips_are_cut_where_words_end(tmp_path: Path) -> None:
    clip(tmp_path / "pretrain/s/1.mp4", num_frames=50)
    (tmp_path / "pretrain/s/1.txt").write_text(PRETRAIN)
    (tmp_path / "pretrain.txt").write_text("s/1\n")
    settings = ReaderConfig(format="lrs", max_seconds=1.0)
    refused = read_lrs(tmp_path / "pretrain.txt", tmp_path, settings)
    assert "it lasts 1.8 seconds, above max_seconds 1; `mllm data import lrs --segments`" in str(refused.problems[0])
    cut = read_lrs(tmp_path / "pretrain.txt", tmp_path, settings, cut=Cutter(tmp_path, "cut"))
    assert said(cut) == {
        f"cut/pretrain/s/1_{number:03d}-{task}": text
        for number, text in enumerate(["ONE TWO", "NS THREE"])
        for task in ("asr", "vsr", "avsr")
    }
    assert not cut.missing
    for number, (first, last) in enumerate([(5, 24), (30, 45)]):
        stem = tmp_path / f"cut/pretrain/s/1_{number:03d}"
        frames = load_video(stem.with_suffix(".mp4"), gray=True).frames
        assert np.abs(frames.mean(axis=(1, 2)) - (np.arange(first, last) * 3 + 10)).max() < 3
        audio = load_audio(stem.with_suffix(".wav")).samples
        whole = load_audio(tmp_path / "pretrain/s/1.wav").samples
        assert np.allclose(audio, whole[first * 640 : last * 640], atol=1e-4)


def test_a_clip_without_times_of_words_that_is_too_long_is_reported(tmp_path: Path) -> None:
    clip(tmp_path / "t/1.mp4", num_frames=50)
    (tmp_path / "t/1.txt").write_text("Text: ONE\n")
    assert not listing_of("lrs", tmp_path / "t", tmp_path, max_seconds=2.5).problems
    assert "no times of words" in str(listing_of("lrs", tmp_path / "t", tmp_path, max_seconds=1.5).problems[0])


def test_segments_are_as_long_as_the_limit_allows() -> None:
    text, words = parse_text(PRETRAIN)
    assert text == "ONE TWO NS THREE"
    assert words[0] == Word("ONE", 0.2, 0.5)
    for limit, expected in (
        (10, ["ONE TWO NS THREE"]),
        (1.2, ["ONE TWO NS", "THREE"]),
        (0.4, ["ONE", "TWO", "NS", "THREE"]),
    ):
        segments = plan_segments(words, limit)
        assert [segment.text for segment in segments] == expected
        assert all(segment.end_seconds - segment.start_seconds <= limit for segment in segments)
    with pytest.raises(ValueError, match=r"the word 'TWO' lasts 0\.36 seconds, above 0\.35"):
        plan_segments(words, 0.35)
    with pytest.raises(ValueError, match="a row of the table of words must be WORD START END, got 'ONE x'"):
        parse_text("Text: ONE\n\nWORD START END ASDSCORE\nONE x\n")


def test_own_clips_with_texts_beside_or_in_a_table(tmp_path: Path) -> None:
    clip(tmp_path / "c/silent.mp4", num_frames=5, with_audio=False)
    clip(tmp_path / "c/both.mp4", num_frames=5)
    soundfile.write(tmp_path / "c/heard.flac", np.zeros(160), 16_000)
    clip(tmp_path / "c/sub/nobody.mp4", num_frames=5)
    (tmp_path / "c/silent.txt").write_text("from the\nfile")
    table = tmp_path / "t.csv"
    table.write_text('both.mp4,"one, two"\nheard,well, yes\nboth,again\nnowhere.mp4,x\nno columns\n')
    listing = listing_of("clips", tmp_path / "c", tmp_path, transcripts=str(table))
    assert said(listing) == {
        "c/both-asr": "one, two",
        "c/both-vsr": "one, two",
        "c/both-avsr": "one, two",
        "c/heard-asr": "well, yes",
        "c/silent-vsr": "from the file",  # it has no audio, so it is no sample of asr
    }
    assert listing.untranscribed == ["c/sub/nobody.mp4", "c/sub/nobody.wav"]
    assert [(finding.path, finding.line_number) for finding in listing.problems] == [(str(table), n) for n in (3, 4, 5)]
    question = listing_of("clips", tmp_path / "c", tmp_path, tasks=["avsr"], transcripts=str(table))
    assert "c/silent: there is no audio for the task avsr" in " ".join(map(str, question.problems))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clip"):
        listing_of("clips", tmp_path / "empty", tmp_path)
    with pytest.raises(ValueError, match="is not under the root"):
        listing_of("clips", tmp_path / "c", tmp_path / "empty")


def test_words_of_another_script_are_what_a_model_learns_and_is_measured_on(tmp_path: Path) -> None:
    touch(tmp_path, "c/1.wav")
    (tmp_path / "c/1.txt").write_text("हिन्दी में बोलो।", encoding="utf-8")
    value = ["data", "import", "clips", str(tmp_path / "c"), "--out", str(tmp_path / "m.jsonl"), "--text", "words"]
    assert main([*value, "--root", str(tmp_path)]) == 0
    (sample,) = read_manifest(tmp_path / "m.jsonl", tmp_path)
    assert references_of(sample) == ["हिन्दी में बोलो"]


def test_settings_that_contradict_each_other() -> None:
    for settings, message in (
        ({"tasks": ["asr"]}, "tasks goes with the formats auto_avsr"),
        ({"text": "lower"}, "text goes with the formats"),
        ({"format": "omni_csv", "transcripts": "x"}, "transcripts goes with the formats clips and auto_avsr"),
        ({"format": "lrs", "max_seconds": -1}, "max_seconds goes with format lrs and is above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ReaderConfig(**settings)


def test_a_run_reads_any_format_and_refuses_bad_rows_all_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "lrs3/1.mp4")
    path = tmp_path / "l.csv"
    path.write_text("lrs3,1.mp4,25,0,hello\nlrs3,gone.mp4,25,0,kept\n")
    settings = ReaderConfig(format="omni_csv", tasks=["vsr"])
    assert [sample.id for sample in read_data(path, None, settings)] == ["lrs3/1-vsr", "lrs3/gone-vsr"]
    path.write_text("lrs3,1.mp4\n" * 30)
    with pytest.raises(ValueError, match=r"l.csv:20: (?s:.)*and 10 more"):
        read_data(path, None, settings)
    path.write_text("")
    with pytest.raises(ValueError, match="there is no sample in it"):
        read_data(path, None, settings)


def test_the_command_writes_what_is_right_and_tells_what_is_wrong(tmp_path: Path, capsys) -> None:
    clip(tmp_path / "m/a.mp4", num_frames=5)
    clip(tmp_path / "m/b.mp4", num_frames=5)
    (tmp_path / "m/a.txt").write_text("Well, yes")
    out, rest = tmp_path / "out.jsonl", tmp_path / "rest.txt"
    words = ["data", "import", "clips", str(tmp_path / "m"), "--root", str(tmp_path), "--out", str(out)]
    assert main([*words, "--tasks", "asr,avsr", "--text", "words", "--untranscribed", str(rest)]) == 0
    samples = read_manifest(out, tmp_path)
    assert [(sample.id, sample.messages[-1].text) for sample in samples] == [
        ("m/a-asr", "well yes"),
        ("m/a-avsr", "well yes"),
    ]
    assert rest.read_text().split() == ["m/b.mp4", "m/b.wav"]
    shown = capsys.readouterr().out
    assert "m/b.mp4: no transcript" in shown
    assert "2 samples (asr 1, avsr 1)" in shown
    assert main(["data", "check", str(out), "--root", str(tmp_path), "--open"]) == 0
    (tmp_path / "l.csv").write_text("m,a.mp4,5,0,one, two\nm,gone.mp4,5,0,x\nm,b.mp4\n")
    words = ["data", "import", "omni_csv", str(tmp_path / "l.csv"), "--out", str(out)]
    assert main([*words, "--prompts", '{"vsr": "read"}', "--tasks", "vsr"]) == 1
    assert [sample.messages[0].text for sample in read_manifest(out, tmp_path)] == ["read"]
    shown = capsys.readouterr().out
    assert "l.csv:2: video m/gone.mp4" in shown
    assert "l.csv:3: a row must be" in shown
    for extra, message in (
        (["--tasks", "asr,lips"], "tasks must be asr, vsr or avsr"),
        (["--segments", "x"], "segments is set, but max_seconds is not"),
        (["--untranscribed", "x"], "untranscribed goes with the format clips"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", "import", "csv", "x", "--out", "y"]) == 2
    assert "omni_csv" in capsys.readouterr().err


def test_the_command_takes_conversations_about_images(tmp_path: Path, capsys) -> None:
    touch(tmp_path, "a.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat, sitting."}]
    entries = [{"id": name, "image": f"{name}.jpg", "conversations": turns} for name in "ab"]
    (tmp_path / "l.json").write_text(json.dumps(entries))
    words = ["data", "import", "llava", str(tmp_path / "l.json"), "--out", str(tmp_path / "out.jsonl")]
    assert main(words) == 1
    assert "sample 'b': image b.jpg: there is no such file" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out.jsonl", tmp_path) == read_llava(tmp_path / "l.json", tmp_path)[:1]
    assert main([*words, "--tasks", "asr"]) == 2
    assert "tasks goes with the formats" in capsys.readouterr().err


def test_the_command_cuts(tmp_path: Path, capsys) -> None:
    clip(tmp_path / "pretrain/s/1.mp4", num_frames=50)
    (tmp_path / "pretrain/s/1.txt").write_text(PRETRAIN)
    out = tmp_path / "out.jsonl"
    words = ["data", "import", "lrs", str(tmp_path / "pretrain"), "--root", str(tmp_path), "--out", str(out)]
    assert main([*words, "--max-seconds", "1", "--segments", "cut", "--tasks", "avsr"]) == 0
    assert [sample.messages[-1].text for sample in read_manifest(out, tmp_path)] == ["ONE TWO", "NS THREE"]
    assert main([*words, "--max-seconds", "1", "--segments", "../cut"]) == 2
    assert "segments: " in capsys.readouterr().err


def test_hostile_lists_give_problems_and_nothing_else(tmp_path: Path) -> None:
    """Rows broken in every way: what is not refused as a whole is listed, and no sample points out of the root."""
    pieces = [
        b",",
        b'"',
        b"\t",
        b"..",
        b"/",
        b"\\",
        b"\0",
        b"\xff",
        b"a",
        b".mp4",
        b"25",
        b"-1",
        b"\xe2\x80\xa8",
        b"\r",
        b" ",
    ]
    good = {
        "omni_csv": b"d,a.mp4,25,1 2,some text",
        "auto_avsr": b"d,a.mp4,25,1 2",
        "fairseq": b"a\td/a.mp4\td/a.wav\t25\t16000",
        "lrs": b"d/a",
    }
    rng = np.random.default_rng(0)
    touch(tmp_path, "d/a.mp4", "d/a.wav", "main/d/a.mp4")
    for folder in ("d", "main/d"):
        (tmp_path / folder / "a.txt").write_text("Text: HELLO")
    for form, row in good.items():
        for _ in range(60):
            rows = []
            for _ in range(5):
                index = int(rng.integers(len(row) + 1))
                middle = b"".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(1, 5)))
                rows.append(row[:index] + middle + row[index + int(rng.integers(4)) :])
            (tmp_path / "l.tsv").write_bytes(b"\n".join([b"/"] * (form == "fairseq") + rows))
            (tmp_path / "l.wrd").write_text("x\n" * 5)
            try:
                listing = listing_of(form, tmp_path / "l.tsv", tmp_path)
            except ValueError:
                continue
            write_manifest(tmp_path / "m.jsonl", listing.samples)
            assert not listing.samples or read_manifest(tmp_path / "m.jsonl", tmp_path) == listing.samples
            for sample in listing.samples:
                whole = [(tmp_path / part.path).resolve() for part in sample.media]
                assert all(path.is_relative_to(tmp_path.resolve()) for path in whole)
