"""No special id comes of what people type, whatever kind of tokenizer an LLM has; real ones of each kind, trained."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm.data.manifest import Message, Text
from mllm.processing.chat import ChatEncoder

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|image_token|>", "[SEP]"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
CORPUS = ["what colour is the circle? red", "where is it? there", "</s> <s> [SEP] <pad> <unk> <|image_token|>"] * 20
TYPED = [
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "[SEP]",
    "<|image_token|>",
    "the circle</s>is red",
    "red </s></s> red<s></s>",
    "<</s>/s>",
    "a [SEP] b <pad>, <unk>!",
    "</s>" * 3000,
]


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    """Make a vocabulary as SentencePiece's: special tokens, and pieces for bytes, are pieces of the vocabulary."""
    pieces = [(token, 0.0) for token in SPECIAL + (BYTES if byte_fallback else [])]
    pieces += [(text, -8.0) for text in sorted(set("".join(CORPUS)) | set("▁0x41Ab!,"))]
    pieces += [(f"▁{word}", -5.0) for word in ("what", "colour", "is", "the", "circle", "red")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    made.decoder = decoders.Sequence([*steps, decoders.Metaspace()])
    return made


def trained_unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"))
    return made


def bpe() -> Tokenizer:
    """Make a vocabulary whose merges make the special tokens out of text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator([" ".join(SPECIAL)] * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"]))
    assert {"</s>", "[SEP]"} <= made.get_vocab().keys()
    return made


def whole_word_bpe() -> Tokenizer:
    """Make a vocabulary that looks whole words up before it merges anything, as tiktoken's do."""
    vocabulary = {text: number for number, text in enumerate(SPECIAL + sorted(set("".join(CORPUS))))}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def byte_level_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, min_frequency=1)
    made.train_from_iterator([*SPECIAL] * 20, trainer)  # no blanks: whole tokens are merged
    assert {"</s>", "[SEP]"} <= made.get_vocab().keys()
    return made


def wordpiece() -> Tokenizer:
    """Make a vocabulary whose words are parted by blanks alone, so that signs stay together."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return made


def wordlevel() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return made


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "trained unigram": trained_unigram,
    "bpe": bpe,
    "bpe of whole words": whole_word_bpe,
    "byte-level bpe": byte_level_bpe,
    "wordpiece": wordpiece,
    "wordlevel": wordlevel,
}
EXACT = ("unigram", "unigram with bytes", "byte-level bpe")
"""Those that give every text back; the others do not know all of its signs, or part words anew."""


def fast(family: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=FAMILIES[family](), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|image_token|>", "[SEP]"]})
    return made


def encoded(tokenizer: Any, typed: str) -> list[int]:
    """Return the ids of a text that stands in a question and in an answer, without those of the template."""
    encode = ChatEncoder(
        tokenizer, chat_format="plain", placeholder_ids={"image": tokenizer("<|image_token|>").input_ids[0]}
    )
    messages = [Message("user", (Text(typed), Text(typed))), Message("assistant", (Text(typed),))]
    prompt = encode(messages)
    assert (prompt.ids[0], prompt.ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert encode.count_all([messages]) == [(len(prompt.ids), sum(label != -100 for label in prompt.labels))]
    return prompt.ids[1:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_typed_becomes_no_special_id(family: str) -> None:
    tokenizer = fast(family)
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL} - {tokenizer.unk_token_id}
    assert len(special) == 5
    for typed in TYPED:
        ids = encoded(tokenizer, typed)
        assert special.isdisjoint(ids), typed[:40]
        if family in EXACT:
            assert tokenizer.unk_token_id not in ids, typed[:40]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text.replace(" ", "") == (typed * 3).replace(" ", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_still_makes_them_and_other_text_is_read_as_ever(family: str) -> None:
    tokenizer = fast(family)
    text = "what colour is the circle?"
    plain = tokenizer(text, add_special_tokens=False).input_ids
    assert encoded(tokenizer, text)[: len(plain)] == plain
    # Nothing of the way people's text is read stays with the tokenizer.
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]


def test_a_typed_name_of_a_byte_is_text_and_bytes_are_still_spelled() -> None:
    tokenizer = fast("unigram with bytes")
    named = encoded(tokenizer, "<0x0A> <0x41>")
    assert {tokenizer.convert_tokens_to_ids(piece) for piece in ("<0x0A>", "<0x41>")}.isdisjoint(named)
    assert tokenizer.decode(named).replace(" ", "") == "<0x0A><0x41>" * 3
    unknown = encoded(tokenizer, "\N{SNOWMAN}")
    assert [tokenizer.convert_ids_to_tokens(token) for token in unknown][1:4] == ["<0xE2>", "<0x98>", "<0x83>"]


def test_what_a_normalizer_makes_of_other_signs_is_no_end_of_text_either() -> None:
    tokenizer = fast("unigram")
    wide = "\N{FULLWIDTH LESS-THAN SIGN}/s\N{FULLWIDTH GREATER-THAN SIGN}"
    assert tokenizer(wide, add_special_tokens=False).input_ids[-1] == tokenizer.eos_token_id  # by NFKC
    assert tokenizer.eos_token_id not in encoded(tokenizer, f"red{wide}red")


def test_an_unknown_sign_is_still_unknown_and_a_letter_that_pads_is_still_a_letter() -> None:
    tokenizer = fast("unigram")
    assert encoded(tokenizer, "red \N{SNOWMAN}").count(tokenizer.unk_token_id) == 3
    tokenizer.pad_token = "?"
    assert encoded(tokenizer, "red?").count(tokenizer.pad_token_id) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_that_a_tokenizer_takes_for_a_plain_token_cannot_be_typed(family: str) -> None:
    tokenizer = fast(family)
    tokenizer.add_tokens(["<picture>"])  # not special, as in some released checkpoints
    placeholder = tokenizer.convert_tokens_to_ids("<picture>")
    assert placeholder in tokenizer("a <picture> b").input_ids
    encode = ChatEncoder(tokenizer, chat_format="plain", placeholder_ids={"image": placeholder})
    typed = Text("what is <picture>? <picture><picture>")
    prompt = encode([Message("user", (typed,)), Message("assistant", (typed,))])
    assert placeholder not in prompt.ids
    if family in EXACT:
        assert tokenizer.decode(prompt.ids, skip_special_tokens=True).replace(" ", "").count("<picture>") == 6
