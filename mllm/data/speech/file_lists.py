"""Reads the lists of speech clips that published systems train on: auto_avsr, Llama-AVSR and Omni-AVSR, fairseq.

    auto_avsr   lrs3,test/a/1.mp4,52,1 7 9             the text is in a file of its own
    omni_csv    lrs3,test/a/1.mp4,52,1 7 9,well, yes   the text is all that follows the fourth comma
    fairseq     a/1  video/a/1.mp4  audio/a/1.wav  52  33280   tab-separated, texts in a .wrd file line by line

Knows those columns. Does not decode media; frames are counted at 25 per second.
"""

import os
import re
from pathlib import Path

from mllm.config.data import ReaderConfig
from mllm.data.findings import Listing
from mllm.data.source_files import read_text, relative_to
from mllm.data.speech.utterances import (
    FRAMES_PER_SECOND,
    Gathering,
    Utterance,
    unquoted,
)
from mllm.media import path_problem

_FIELD = r'("(?:[^"]|"")*"|[^,"]*)'
_FOUR = re.compile(",".join([_FIELD] * 4))
_FIVE = re.compile(_FOUR.pattern + ",(.*)")
AUDIO_RATE_HZ = 16_000


def read_auto_avsr(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read `dataset,rel_path,n_frames,token ids`; the ids belong to a vocabulary that the list does not hold.

    The text is read from the file of the same name and the suffix .txt: in the folder `transcripts` when it is given,
    else beside the video, else where the folder called `..._video_...` has a neighbour called `..._text_...`.

    Raises:
        OSError: the list cannot be read.
    """
    gathering = Gathering(source, root, config)
    for line_number, line in gathering.lines(source):
        row = _FOUR.fullmatch(line)
        if row is None:
            columns = "dataset,rel_path,n_frames,token_ids"
            hint = "; with a text after that it is format omni_csv" if _FIVE.fullmatch(line) else ""
            gathering.problem(f"a row must be {columns}{hint}", line_number)
            continue
        with gathering.row(line_number):
            fields = [unquoted(text) for text in row.groups()]
            if problem := path_problem(f"{fields[0]}/{fields[1]}"):
                raise ValueError(f"rel_path: {problem}, got {fields[0]}/{fields[1]}")
            _add_clip(gathering, fields, _text_of(gathering, fields[0], fields[1]), line_number)
    return gathering.listing


def read_omni_csv(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read `dataset,rel_path,n_frames,token_ids,text`; a comma in the text is text, and so are quotes inside it.

    A field that stands in quotes as a whole is unquoted, as CSV writers mean it.

    Raises:
        OSError: the list cannot be read.
    """
    gathering = Gathering(source, root, config)
    for line_number, line in gathering.lines(source):
        row = _FIVE.fullmatch(line)
        if row is None:
            gathering.problem("a row must be dataset,rel_path,n_frames,token_ids,text", line_number)
            continue
        with gathering.row(line_number):
            fields = [unquoted(text) for text in row.groups()]
            if fields[4].startswith('"') and fields[4].count('"') % 2:
                raise ValueError("the quote before the text is not closed on this line")
            _add_clip(gathering, fields, fields[4], line_number)
    return gathering.listing


def read_fairseq(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read a .tsv of AV-HuBERT (id, video, audio, frames, samples; more are ignored), texts in the .wrd beside it.

    A row of two columns (audio, samples) is that of HuBERT. The first line of the file is the folder that paths are
    relative to; where it is not under the root, as when the list was made on another machine, the root itself is.

    Raises:
        ValueError: the .wrd file has another number of lines.
        OSError: one of the two cannot be read.
    """
    gathering = Gathering(source, root, config)
    rows = list(gathering.lines_and_gaps(source))
    words = source.with_suffix(".wrd")
    texts = read_text(words).removesuffix("\n").split("\n")
    if not rows or len(texts) != len(rows) - 1:
        raise ValueError(f"{words} has {len(texts)} lines for {max(len(rows) - 1, 0)} clips in {source}")
    # Texts are matched by number of line, so a line that cannot be read still counts (`lines_and_gaps`).
    base = _base_of(rows[0][1] or "", root)
    for (line_number, line), text in zip(rows[1:], texts, strict=True):
        if line is None:
            continue  # what is wrong with it has been noted
        fields = line.split("\t")
        if len(fields) == 2:
            fields = [os.path.splitext(fields[0])[0], "", fields[0], "", fields[1]]
        if len(fields) < 5 or not fields[4].isdecimal():
            gathering.problem("a row must be id, video, audio, frames, samples, or path and samples", line_number)
            continue
        with gathering.row(line_number):
            files = {
                medium: _inside(path, base, root)
                for medium, path in (("audio", fields[2]), ("video", fields[1]))
                if path
            }
            utterance = Utterance(fields[0], files, text, int(fields[4]) / AUDIO_RATE_HZ)  # type: ignore[arg-type]
            gathering.add(utterance, line_number)
    return gathering.listing


def _add_clip(gathering: Gathering, fields: list[str], text: str, line_number: int) -> None:
    """Take up a row of dataset, path and frames, with the audio beside the video or its own, where there is one."""
    dataset, path, frames = (field.strip() for field in fields[:3])
    if not frames.isdecimal() or int(frames) < 1:
        gathering.problem(f"n_frames must be a whole number above 0, got {frames!r}", line_number)
        return
    video = f"{dataset}/{path}" if dataset else path
    name = os.path.splitext(video)[0]
    files = gathering.files_of(video)
    gathering.add(Utterance(name, files, text, int(frames) / FRAMES_PER_SECOND), line_number)


def _text_of(gathering: Gathering, dataset: str, path: str) -> str:
    stem = os.path.splitext(f"{dataset.strip()}/{path.strip()}")[0]
    folder = gathering.config.transcripts
    if folder is not None:
        inner = os.path.splitext(path.strip())[0]
        candidates = [Path(folder) / f"{stem}.txt", Path(folder) / f"{inner}.txt"]
    else:
        candidates = [gathering.root / f"{stem}.txt", gathering.root / f"{stem.replace('_video_', '_text_')}.txt"]
    for candidate in candidates:
        if candidate.is_file():
            return read_text(candidate)
    tried = " or ".join(dict.fromkeys(map(str, candidates)))
    raise ValueError(f"the list holds no text, and there is none in {tried} (key transcripts)")


def _base_of(stated: str, root: Path) -> Path:
    """Return the stated folder of a list where it is under the root; else the root."""
    full = Path(os.path.abspath(root / stated))
    return full if full.is_relative_to(os.path.abspath(root)) else root


def _inside(path: str, base: Path, root: Path) -> str:
    if not os.path.isabs(path) and (problem := path_problem(path)):
        raise ValueError(f"{problem}, got {path!r}")
    return relative_to(root, base / path)
