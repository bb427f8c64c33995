"""Builds the synthetic tokenizer, a byte-level BPE in which every word of the synthetic corpus is one token.

Knows the words of the sentences, scenes, questions, prompts and phones. Does not know media or models.

Any text can be tokenised, since bytes are the alphabet. A text is read as if it began with a space, so " red" and "red"
are the same token wherever a piece of text begins, and the first space is dropped again when ids become text.
"""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm.processing.processor import PLACEHOLDER_TOKENS
from mllm.synthetic.images.questions import ANSWERS, COLUMN_WORDS, ROW_WORDS
from mllm.synthetic.images.scenes import SHAPES
from mllm.synthetic.prompts import MEDIA_MARKERS, SPEECH_TASKS
from mllm.synthetic.speech.phones import PHONES
from mllm.synthetic.speech.sentences import LEXICON

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_VOCABULARY = 1200

# Bytes are written as characters before words are parted, space as Ġ and line breaks and tabs as Ċ č ĉ. A word is
# whatever is neither white space nor an ASCII sign (the underscore counts as a letter), with the space before it.
_SIGNS = r"!-/:-@\[-^`{-~"
_WORD = rf"Ġ?[^ĠĊčĉ{_SIGNS}]+|Ġ?[{_SIGNS}]+|[ĠĊčĉ]+"
_OTHER_WORDS = (
    *("what", "colour", "is", "the", "it", "or", "ground", "letter", "on", "how", "many", "objects", "left", "of"),
    *("above", "describe", "picture", "speech", "video", "audio", "image", "text", "a", "an", "there", "are", "and"),
)


def phone_word(phone: str) -> str:
    """Give the word that stands for a phone in text; the underscore keeps the phone k apart from the letter k."""
    return f"_{phone}"


def lexicon() -> list[str]:
    """List every word of the synthetic corpus, sorted; each is one token with a space before it."""
    words = {*LEXICON, *SHAPES, *COLUMN_WORDS, *ROW_WORDS, *_OTHER_WORDS}
    words.update(word for answers in ANSWERS.values() for word in answers)
    words.update(word for prompt in SPEECH_TASKS for word in prompt.rstrip(".").split())
    words.update(phone_word(phone) for phone in PHONES)
    return sorted(words)


def special_tokens() -> list[str]:
    """List BOS, EOS, padding, the markers around a medium's span and its placeholder, in the order of their ids."""
    markers = [marker for pair in MEDIA_MARKERS.values() for marker in pair]
    return [PAD, BOS, EOS, *markers, *PLACEHOLDER_TOKENS.values()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the lexicon; it depends on nothing else and is the same every time.

    Raises:
        ValueError: the lexicon has outgrown `MAX_VOCABULARY`, so that a word of it is more than one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[token for token in special_tokens() if token not in (BOS, EOS, PAD)],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )
    _check_single_tokens(fast)
    return fast


def word_id(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """Look up the id of a word of the lexicon or of a special token.

    Raises:
        ValueError: the word is not one token.
    """
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is not one token but {len(ids)}: {tokenizer.convert_ids_to_tokens(ids)}")
    return ids[0]


def _training_text() -> Iterator[str]:
    for word in lexicon():
        yield f" {word}"
    yield from (" .", " ;", " ,", " ?", "?", ".", ";", ",")


def _check_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in lexicon():
        word_id(tokenizer, word)
