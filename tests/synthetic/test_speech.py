"""What the voices promise: phones that cover the audio, one waveform per call, sentences and voices held out."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from mllm.synthetic.speech.phones import PHONES, phones_of_ipa
from mllm.synthetic.speech.sentences import LEXICON, sample_sentences, split_of
from mllm.synthetic.speech.synthesis import LEVEL_RMS, SAMPLE_RATE_HZ, phone_string, synthesise
from mllm.synthetic.speech.voices import VOICES, Voice, random_speaker

SPLITS = ("train", "validation", "test")
VOICE = VOICES["train"][0]


def test_no_sentence_stands_in_two_splits() -> None:
    by_split = {split: set(sample_sentences(400, split=split, seed=3)) for split in SPLITS}
    assert all(len(sentences) == 400 for sentences in by_split.values())
    assert all(not by_split[a] & by_split[b] for a, b in combinations(SPLITS, 2))
    assert all(split_of(sentence) == split for split in SPLITS for sentence in by_split[split])


def test_sentences_use_the_lexicon_and_depend_on_the_seed_alone() -> None:
    sentences = sample_sentences(3000, split="train", seed=1)
    assert {word for sentence in sentences for word in sentence.split()} == set(LEXICON)
    assert sentences[:50] == sample_sentences(50, split="train", seed=1)
    assert sentences[:50] != sample_sentences(50, split="train", seed=2)


def test_no_voice_and_no_family_of_voices_stands_in_two_splits() -> None:
    families = {split: {voice.variant.rstrip("0123456789") for voice in VOICES[split]} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        shared = families[first] & families[second]
        assert shared <= {"f", "m"}, "f1, f2, ... and m1, m2, ... are different voices; every other number is kin"
        assert not {voice.variant for voice in VOICES[first]} & {voice.variant for voice in VOICES[second]}


@pytest.mark.parametrize("split", SPLITS)
def test_every_voice_speaks_and_its_phones_cover_the_audio(split: str) -> None:
    for voice in VOICES[split]:
        utterance = synthesise("they fell over the small jewel", voice)
        assert utterance.samples.dtype == np.float32
        assert utterance.seconds == pytest.approx(len(utterance.samples) / SAMPLE_RATE_HZ)
        assert utterance.phones[0][1] == 0.0
        assert utterance.phones[-1][2] == pytest.approx(utterance.seconds)
        assert all(end == start for (_, _, end), (_, start, _) in pairwise(utterance.phones))
        assert all(start < end and symbol in PHONES for symbol, start, end in utterance.phones)


def test_timings_point_at_the_sounds() -> None:
    utterance = synthesise("she said yes", Voice("en-us", "m3"))
    levels = {}
    for symbol, start, end in utterance.phones:
        part = utterance.samples[round(start * SAMPLE_RATE_HZ) : round(end * SAMPLE_RATE_HZ)]
        spectrum = np.abs(np.fft.rfft(part)) ** 2
        high = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE_HZ) > 3000
        levels[symbol] = (np.sqrt(np.mean(part**2)), spectrum[high].sum() / spectrum.sum())
    assert levels["sil"][0] < 0.1 * LEVEL_RMS < levels["iy"][0]
    assert levels["s"][1] > 0.5 > 0.2 > levels["eh"][1]


def test_final_l_is_a_phone_of_its_own() -> None:
    assert phone_string(synthesise("fell", VOICE).phones) == ("f", "eh", "l")


def test_the_waveform_is_a_function_of_the_arguments() -> None:
    first = synthesise("place blue at f two now", VOICE, pitch=40)
    synthesise("something else in between", VOICES["test"][1])
    again = synthesise("place blue at f two now", VOICE, pitch=40)
    assert np.array_equal(first.samples, again.samples)
    assert first.phones == again.phones
    other = synthesise("place blue at f two now", VOICE, pitch=60)
    assert not np.array_equal(first.samples, other.samples)


def test_speakers_come_from_the_voices_of_their_split() -> None:
    speakers = [random_speaker("test", np.random.default_rng(seed)) for seed in range(40)]
    assert {speaker.voice for speaker in speakers} <= set(VOICES["test"])
    assert random_speaker("test", np.random.default_rng(0)) == speakers[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": " "}, "text to speak is empty"),
        ({"voice": Voice("en-xx", "m3")}, "no accent 'en-xx'"),
        ({"voice": Voice("en-us", "nobody")}, "no voice variant 'nobody'"),
        ({"pitch": 100}, "pitch must be from 0 to 99, got 100"),
        ({"speaking_rate_wpm": 20}, "speaking_rate_wpm must be from 80 to 450, got 20"),
    ],
)
def test_what_cannot_be_spoken_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesise(**({"text": "hello", "voice": VOICE} | arguments))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        sample_sentences(1, split="dev", seed=0)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        random_speaker("dev", np.random.default_rng(0))
    with pytest.raises(ValueError, match="IPA symbol"):
        phones_of_ipa("ʘ")
