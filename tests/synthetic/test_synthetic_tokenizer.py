"""The tokenizer of the synthetic corpus: one token per word, any text, the same text back."""

import pytest

from mllm.synthetic.images.questions import ANSWERS
from mllm.synthetic.prompts import SPEECH_PROMPTS
from mllm.synthetic.speech.phones import PHONES
from mllm.synthetic.speech.sentences import LEXICON
from mllm.synthetic.tokenizer import build_tokenizer, lexicon, phone_word, special_tokens, word_id


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_and_every_answer_is_one_token_with_or_without_its_space(tokenizer) -> None:
    words = {*lexicon(), *LEXICON, *(word for answers in ANSWERS.values() for word in answers)}
    words.update(phone_word(phone) for phone in PHONES)
    ids = {word: word_id(tokenizer, word) for word in words}
    assert len(set(ids.values())) == len(words)
    assert all(tokenizer.encode(f" {word}", add_special_tokens=False) == [ids[word]] for word in words)


def test_a_text_is_its_words(tokenizer) -> None:
    for text in (*SPEECH_PROMPTS.values(), "what colour is the circle?", "is the star left of the cross?"):
        words = text[:-1].split()
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids[:-1] == [word_id(tokenizer, word) for word in words]
        assert tokenizer.convert_ids_to_tokens(ids[-1]) == text[-1]


@pytest.mark.parametrize("text", ["red", "Hello, wörld  2024\n\tok", "a-b c_d 'e'", "日本語 🙂", "x  y   z", ""])
def test_any_text_comes_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_have_fixed_ids_and_written_ones_stay_text(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(special_tokens()) == list(range(len(special_tokens())))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    written = tokenizer("<image> </s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(written) & set(range(len(special_tokens())))


def test_a_word_outside_the_lexicon_has_no_id_of_its_own(tokenizer) -> None:
    with pytest.raises(ValueError, match="'zeppelin' is not one token but"):
        word_id(tokenizer, "zeppelin")


def test_it_is_built_the_same_every_time(tokenizer) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
