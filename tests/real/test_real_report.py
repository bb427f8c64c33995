"""The report of the demo on real weights, from answers that are at hand."""

from pathlib import Path
from typing import Any

import pytest

from mllm.real.report import PLOT, REPORT, compare, spoken_by_whisper

SAID = {"test/a": "press one to mute", "test/b": "thank you for calling", "heldout/00000": "water a hose"}


def line(name: str, rate: int, hypothesis: str) -> dict[str, Any]:
    return {
        "set": name.partition("/")[0],
        "id": name,
        "budget": f"audio=/{rate}",
        "references": [SAID[name]],
        "hypothesis": hypothesis,
        "tokens": {"audio": 100 // rate},
    }


LINES = [
    *[line(name, 25, "") for name in SAID],
    *[line("test/a", 4, "press one to mute"), line("test/b", 4, "thank you for coming")],
    line("heldout/00000", 4, "water a hose"),
]
WHISPER = {"a": "Press 1 to mute.", "b": "Thank you!"}


def test_rates_and_whisper_are_scored_on_the_same_recordings() -> None:
    report = compare(LINES, WHISPER, seed=0)
    assert report.soft_tokens == {"audio=/4": 25, "audio=/25": 4}
    assert report.scores["test", "audio=/4"].value == 1 / 8
    assert report.scores["test", "audio=/25"].value == 1
    assert report.scores["heldout", "audio=/4"].value == 0
    assert report.whisper.value == 2 / 8  # "1" is one, and two words are missing
    assert [finding.holds for finding in report.findings] == [False, True]
    assert "| `audio=/4` | 25.0 | 12.5 (" in report.table
    assert "| Whisper base itself |  | 25.0 (" in report.table
    assert "| `audio=/4` | thank you for coming |" in report.transcripts
    assert "| said | **thank you for calling** |" in report.transcripts


def test_the_report_is_written_with_its_plot(tmp_path: Path) -> None:
    report = compare(LINES, WHISPER, seed=0)
    report.write(tmp_path)
    assert report.table in (tmp_path / REPORT).read_text()
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_recording_that_was_not_answered_is_no_smaller_test() -> None:
    failed = {key: value for key, value in LINES[0].items() if key != "hypothesis"} | {"error": {"kind": "corrupt"}}
    with pytest.raises(ValueError, match="1 clips were not answered, the first is test/a"):
        compare([failed, *LINES[1:]], WHISPER, seed=0)


@pytest.mark.parametrize(
    ("written", "words"),
    [("Press 1, or 2.", "press one or two"), ("He's ill-disposed.", "he's ill disposed"), (" 204", "two zero four")],
)
def test_what_whisper_writes_is_compared_as_words(written: str, words: str) -> None:
    assert spoken_by_whisper(written) == words
