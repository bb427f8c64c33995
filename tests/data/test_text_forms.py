"""Transcripts keep every letter, mark and digit of their script, and come out alike however they were typed."""

# ruff: noqa: RUF001 (letters that look like others are the matter)

import unicodedata

import pytest

from mllm.data.text_forms import TEXT_FORMS

words = TEXT_FORMS["words"]


def test_forms_of_text() -> None:
    text = " It\u2019s  A well-known,\n'quoted' FACT! "
    assert TEXT_FORMS["as_is"](text) == "It\u2019s A well-known, 'quoted' FACT!"
    assert TEXT_FORMS["lower"](text) == "it\u2019s a well-known, 'quoted' fact!"
    assert words(text) == "it's a well known quoted fact"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("हिन्दी में बोलो।", "हिन्दी में बोलो"),  # vowel signs and virama are marks, the danda is punctuation
        ("क्‍ष, १२३", "क्‍ष १२३"),  # a joiner inside a word spells it; digits of the script
        ("বাংলায় কথা বলুন!", "বাংলায় কথা বলুন"),
        ("தமிழில் பேசு.", "தமிழில் பேசு"),
        ("ฉันพูดภาษาไทยได้ ๕ คำ", "ฉันพูดภาษาไทยได้ ๕ คำ"),
        ("သွား၊ လာ။", "သွား လာ"),
        ("اَلْعَرَبِيَّةُ، لُغَةٌ؟", "اَلْعَرَبِيَّةُ لُغَةٌ"),  # harakat
        ("می\u200cخواهم «۱۲»", "می\u200cخواهم ۱۲"),
        ("שָׁלוֹם, עוֹלָם־יָפֶה", "שָׁלוֹם עוֹלָם יָפֶה"),  # points stay, the maqaf parts words
        ("צ׳ק", "צ'ק"),
        ("İstanbul'da IŞIK", "istanbul'da işik"),  # the language is not known: I is i
        ("ISTANBUL ılık", "istanbul ılık"),
        ("Die STRAẞE, die Straße", "die straße die straße"),
        ("ΟΔΟΣ ὁδός", "οδος ὁδός"),  # the last sigma of a word
        ("L\u2019été, aujourd\u2019hui", "l'été aujourd'hui"),
        ("rock 'n' roll, dogs' \u2018tails\u2019", "rock n roll dogs tails"),
        ("м\u02bcята М'ЯТА", "м'ята м'ята"),
        ("Tiếng Việt", "tiếng việt"),
        ("日本語を、話す。ﾃﾞｰﾀ", "日本語を 話す ﾃﾞｰﾀ"),
        ("한국어로 말해요.", "한국어로 말해요"),
        ("ʻŌlelo Hawaiʻi", "ʻōlelo hawaiʻi"),
        ("snake_case 3.5 ½", "snake case 3 5 ½"),
        ("co\u00adop\ufeff well\u200fknown", "coop wellknown"),  # what cannot be seen goes without a trace
        ("ខ្ញុំ\u200bនិយាយ៖ \u200bខ្មែរ។", "ខ្ញុំ និយាយ ខ្មែរ"),  # but for the space of no width
        ("ok \U0001f44d\U0001f3fd \u2764\ufe0f yes", "ok yes"),  # signs leave nothing behind
        ("\u0301a \u0301 b", "a b"),  # marks that stand on nothing
        ("--- '' \u200d", ""),
    ],
)
def test_words_are_those_of_their_language(text: str, kept: str) -> None:
    kept = unicodedata.normalize("NFC", kept)
    assert words(text) == kept
    assert words(unicodedata.normalize("NFD", text)) == kept
    assert words(kept) == kept
