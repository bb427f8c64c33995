"""What is read of other tools' files and texts, without their packages."""

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mllm.real.ctranslate2 import read_variables
from mllm.real.packages import check_digest, fetch_debian, package_file
from mllm.real.recordings import spoken
from mllm.real.rooms import change
from mllm.real.sentences import (
    MOST_CHARACTERS,
    in_other_forms,
    in_words,
    normalise,
    phrase_of,
    spelled_letters,
    spoken_number,
    wordnet_examples,
)


def written(
    arrays: dict[str, np.ndarray], aliases: dict[str, str], *, version: int = 6, codes: dict[str, int] | None = None
) -> bytes:
    """A file as CTranslate2's converter writes it (`specs/model_spec.py`, binary version 6)."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = codes or {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, values in arrays.items():
        out += string(name) + struct.pack("<B", values.ndim)
        out += b"".join(struct.pack("<I", size) for size in values.shape)
        out += struct.pack("<BI", codes[values.dtype.name], values.nbytes) + values.tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(string(alias) + string(name) for alias, name in aliases.items())


ARRAYS = {
    "encoder/conv1/weight": np.arange(24, dtype=np.float16).reshape(2, 4, 3),
    "decoder/activation": np.array(3, dtype=np.int8),
    "decoder/num_heads": np.array(8, dtype=np.int16),
}


def test_variables_come_back_as_they_were_written() -> None:
    variables = read_variables(written(ARRAYS, {"decoder/projection/weight": "decoder/embeddings/weight"}))
    assert variables.specification == "WhisperSpec"
    assert list(variables.arrays) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert variables.arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(variables.arrays[name], values)
    assert variables.aliases == {"decoder/projection/weight": "decoder/embeddings/weight"}


def test_a_file_that_is_cut_off_or_too_long_is_refused() -> None:
    whole = written(ARRAYS, {})
    for size in range(len(whole)):
        with pytest.raises(ValueError, match=r"the file ends at byte|is of version"):
            read_variables(whole[:size])
    with pytest.raises(ValueError, match="3 bytes after its last alias"):
        read_variables(whole + b"abc")


def test_other_versions_types_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="version 5; version 6 is read"):
        read_variables(written(ARRAYS, {}, version=5))
    with pytest.raises(ValueError, match="decoder/num_heads has dtype 9; allowed: 0, 1, 2, 3, 4"):
        read_variables(written(ARRAYS, {}, codes={"float16": 4, "int8": 1, "int16": 9}))
    short = written({"name": np.zeros(4, np.float32)}, {}).replace(struct.pack("<I", 16), struct.pack("<I", 12), 1)
    with pytest.raises(ValueError, match=r"name has 3 values and shape \(4,\)"):
        read_variables(short[:-8] + short[-4:])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Press 1 to mute, 2 to lock.", "press one to mute two to lock"),
        ("press * to toggle pause", "press star to toggle pause"),
        ("I'm sorry, that's not a valid extension.", "i'm sorry that's not a valid extension"),
        ("De-activated.", "de activated"),
        ("...to leave the conference.", "to leave the conference"),
        ("3D audio disabled", None),
        ("[ascending tones]", None),
        ("<beep ascending>", None),
        ("extension 204", None),
        ("followed by # to exit", None),
    ],
)
def test_prompts_are_written_out_as_they_are_said_or_left_out(text: str, said: str | None) -> None:
    assert spoken(text) == said


def test_texts_are_compared_as_lower_case_words() -> None:
    assert normalise("He's ill-disposed,  ISN'T he? 'Yes.'") == "he's ill disposed isn't he yes"


def test_numbers_are_words_and_a_function_of_the_generator() -> None:
    said = [spoken_number(np.random.default_rng(seed)) for seed in range(200)]
    assert said == [spoken_number(np.random.default_rng(seed)) for seed in range(200)]
    assert all(normalise(text) == text for text in said)
    assert min(len(text.split()) for text in said) == 1
    assert any(len(text.split()) > 6 for text in said)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (7, "seven"),
        (10, "ten"),
        (19, "nineteen"),
        (20, "twenty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (312, "three hundred twelve"),
        (1_000, "one thousand"),
        (40_050, "forty thousand fifty"),
        (999_999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_examples_of_wordnet_are_those_any_voice_can_say(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        (folder / f"data.{part}").write_text("  1 This software and database is being provided\n", encoding="latin-1")
    line = '0001 00 a 01 able 0 000 | having means; "able to swim"; "Able to swim!"; "able"; "in 1990 it was \xe9"\n'
    (folder / "data.adj").write_text("  1 licence\n" + line, encoding="latin-1")
    assert wordnet_examples(tmp_path) == ["able to swim"]


def test_phrases_are_neighbouring_words_of_a_sentence() -> None:
    sentence = "He didn't steal, he said; he borrowed."
    said = {phrase_of(sentence, np.random.default_rng(seed)) for seed in range(300)}
    assert all(f" {phrase} " in f" {normalise(sentence)} " for phrase in said)
    assert {len(phrase.split()) for phrase in said} == {1, 2, 3}
    assert {"he", "borrowed", "steal he said"} <= said
    assert phrase_of("Go!", np.random.default_rng(0)) == "go"


def test_letters_are_capitals_which_voices_call_by_their_names() -> None:
    said = [spelled_letters(np.random.default_rng(seed)) for seed in range(300)]
    assert all(len(letter) == 1 and letter.isupper() for text in said for letter in text.split())
    assert {len(text.split()) for text in said} == {1, 2, 3}
    assert {letter for text in said for letter in text.split()} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_some_sentences_are_said_in_other_forms() -> None:
    sentences = [f"the number is {in_words(number)}" for number in range(1000)]
    spare = [f"a spare one is {in_words(number)}" for number in range(150)]
    tested = {"the number", "the number is"}
    said = list(in_other_forms(sentences, left := list(spare), seed=0, tested=tested))
    assert said == list(in_other_forms(sentences, list(spare), seed=0, tested=tested))
    pairs = [(one, whole.split(". ")) for one, whole in zip(sentences, said, strict=True) if "." in whole]
    assert 100 < len(pairs) < 200  # a fifth, but for sentences that are too long to go with another
    assert all(first == one and len(one) <= MOST_CHARACTERS // 2 for one, (first, _) in pairs)
    taken = [second for _, (_, second) in pairs]
    assert len(set(taken)) == len(taken)  # none twice
    assert sorted([*taken, *left]) == sorted(spare)
    assert not {normalise(text) for text in said} & tested
    assert sum(text.isupper() for text in said) in range(5, 50)
    phrases = [text for one, text in zip(sentences, said, strict=True) if text in one and text != one]
    assert len(phrases) in range(60, 130)


def test_changes_are_a_function_of_the_generator_and_stay_in_range() -> None:
    samples = np.sin(np.arange(16_000) / 20).astype(np.float32)
    for seed in range(20):
        out = change(samples, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, change(samples, np.random.default_rng(seed)))
        assert out.dtype == np.float32
        assert np.abs(out).max() <= 1.0
        assert 16_000 / 1.25 < len(out) < 16_000 / 0.85 + 2 * 0.3 * 16_000
        assert np.sqrt(np.mean(out**2)) > 0.01


def test_a_package_that_is_not_installed_says_how_it_is() -> None:
    with pytest.raises(ImportError, match=r"no_such_package is not installed: `make test-real`.*'\.\[real\]'"):
        package_file("no_such_package", "data")


def test_a_file_of_another_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"other")
    with pytest.raises(ValueError, match="weights is not the file that was tested: SHA-256"):
        check_digest(tmp_path / "weights", "0" * 64)


def test_debian_packages_are_unpacked_once_and_missing_tools_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "known").mkdir()
    assert fetch_debian("known", tmp_path) == tmp_path / "known"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get was not found; the recordings come as the Debian package new"):
        fetch_debian("new", tmp_path)


def test_what_the_client_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("apt-get", "dpkg-deb"):
        script = tmp_path / command
        script.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert subprocess.run(["apt-get"], capture_output=True).returncode == 100
    with pytest.raises(RuntimeError, match=r"`apt-get download new` failed .*Unable to locate package"):
        fetch_debian("new", tmp_path / "packages")
    assert not (tmp_path / "packages" / "new").exists()
