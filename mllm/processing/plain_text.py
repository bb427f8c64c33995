"""Reads what people wrote as plain text: no id that only a template may make ever comes of it.

Knows a fast tokenizer. Does not know conversations, templates or media.

A tokenizer can be told to take special tokens for text, but that stops only its search for them: its model still finds
"</s>" where it is a piece of the vocabulary, as in every Unigram vocabulary, in BPE that looks whole words up or has
merges that make it, and in WordPiece and WordLevel wherever a word is not split at signs. So what comes back is looked
through, and text that was read as such a token is cut inside it and read in two pieces, which no longer hold it. This
needs no knowledge of what kind of model a tokenizer is.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens of a tokenizer by id: those that have a role, and those that only say they are special.

    The library's own list leaves the second out, such as the ends of turns of many chats.
    """
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


@dataclass(frozen=True)
class Reserved:
    """Holds the ids that a typed text must not become.

    ids: special tokens. spelled: ids that text may well give, the unknown token and pieces of single bytes, but not by
    spelling their names; with those names.
    """

    ids: frozenset[int]
    spelled: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, ids: Collection[int] = ()) -> "Reserved":
        """Find them in a fast tokenizer, and add some that it takes for plain tokens.

        A special token of one character, such as "!" that somebody took for padding, is a letter like others: there is
        no other way to read it.
        """
        special = special_tokens(tokenizer)
        spelled = {token_id: text for text, token_id in tokenizer.get_vocab().items() if _BYTE_PIECE.fullmatch(text)}
        if tokenizer.unk_token_id is not None:
            spelled[tokenizer.unk_token_id] = tokenizer.unk_token
        reserved = {*ids, *(token_id for token_id, text in special.items() if len(text) > 1)}
        return cls(frozenset(reserved - spelled.keys()), spelled)

    def cuts(self, text: str, encoding: Any) -> list[int]:
        """Find the places inside the tokens that were typed, in order; at least one character lies before each."""
        cuts = set()
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.ids and end - start > 1:
                cuts.add(start + 1)
            elif name := self.spelled.get(token_id):
                start_of_name = text.find(name, start, end)
                cuts |= {start_of_name + 1} if start_of_name >= 0 and len(name) > 1 else set()
        return sorted(cuts)


class PlainText:
    """Reads texts of people.

    Args:
        tokenizer: a fast tokenizer, for text that begins.
        going_on: the same for text that goes on after other text, without the space that some put first.
        reserved_ids: what text must not become although the tokenizer says nothing of it, as of placeholders that a
            checkpoint holds as plain added tokens.
    """

    def __init__(self, tokenizer: Any, going_on: Any, *, reserved_ids: Collection[int] = ()) -> None:
        self._tokenizers = {False: tokenizer, True: going_on}
        self.reserved = Reserved.of(tokenizer, reserved_ids)
        self._suspects = self.reserved.ids | self.reserved.spelled.keys()

    def __call__(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        """Encode texts that begin, or that go on; ids by text."""
        if not texts:
            return []
        backend = self._tokenizers[continues].backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        # Special tokens are typed for what they look like; where they are meant, the template says so.
        backend.encode_special_tokens = True
        try:
            read = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            cuts_by_text = {number: [] for number, ids in enumerate(read) if not self._suspects.isdisjoint(ids)}
            for number in cuts_by_text:  # the quick way of encoding keeps no offsets
                encoding = backend.encode(texts[number], add_special_tokens=False)
                cuts_by_text[number] = self.reserved.cuts(texts[number], encoding)
        finally:
            backend.encode_special_tokens = False
        for number, cuts in cuts_by_text.items():
            if cuts:
                read[number] = self._in_pieces(texts[number], cuts, continues=continues)
        return read

    def _in_pieces(self, text: str, cuts: Sequence[int], *, continues: bool) -> list[int]:
        first, *others = [text[start:end] for start, end in pairwise((0, *cuts, len(text)))]
        read = [*self([first], continues=continues), *self(others, continues=True)]
        return [token_id for ids in read for token_id in ids]
