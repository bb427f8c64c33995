"""Chooses the tokens that a model adds to its LLM's vocabulary: placeholders of media, and marks around them.

Knows configs, tokenizers and how many rows an embedding has. Does not know what a token is for in a prompt.

A placeholder never reaches the LLM, which gets a soft token in its place. A mark does, and is read by a row of its own
where the LLM was never trained on it; see `mllm.model.new_tokens`.
"""

from typing import Any

import torch

from mllm.checkpoints.pretrained import read_tokenizer
from mllm.config.model import ModelConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.new_tokens import mean_of_pieces
from mllm.model.trainables import whole
from mllm.processing.processor import PLACEHOLDER_TOKENS


def extended_tokenizer(config: ModelConfig, *, num_rows: int) -> Any:
    """Read the LLM's tokenizer and add the placeholders and marks that it does not know.

    A padding token for which the LLM has no row is forgotten: nothing reads it.

    Args:
        num_rows: of the LLM's embedding.

    Raises:
        ValueError: a beginning or an end of text that the LLM can neither read nor say.
    """
    assert config.llm is not None
    tokenizer = read_tokenizer(config.llm)
    for kind in ("bos", "eos"):
        if (token_id := getattr(tokenizer, f"{kind}_token_id")) is not None and token_id >= num_rows:
            raise ValueError(
                f"the tokenizer of model.llm {config.llm} gives its {kind}_token "
                f"{getattr(tokenizer, f'{kind}_token')!r} the id {token_id}, but the LLM embeds {num_rows} tokens; the "
                "two do not belong together"
            )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_rows:
        tokenizer.pad_token = None
    wanted = [PLACEHOLDER_TOKENS[medium] for medium in config.encoded_media]
    wanted += _marks(config)
    known = tokenizer.get_vocab()
    if missing := [token for token in dict.fromkeys(wanted) if token not in known]:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return tokenizer


def find_new_tokens(config: ModelConfig, tokenizer: Any, *, num_rows: int) -> dict[str, int]:
    """Find the marks that the LLM was never trained on; returns their ids by their texts.

    Those are the ones its own tokenizer does not know, for which its embedding has no row, or a spare one, and those it
    knows but has no row for.

    Args:
        tokenizer: of `extended_tokenizer`. num_rows: of the LLM's embedding.
    """
    assert config.llm is not None
    known = read_tokenizer(config.llm).get_vocab()
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(_marks(config))}
    return {token: token_id for token, token_id in ids.items() if token not in known or token_id >= num_rows}


def start_new_tokens(model: ElasticForConditionalGeneration, tokenizer: Any) -> None:
    """Let each new token begin as the LLM reads its text where somebody types it: as the mean of the text's pieces.

    One whose text has no pieces that the LLM embeds keeps the row it has.
    """
    new_tokens: Any = model.model.new_tokens
    if new_tokens is None:
        return
    embed, num_rows = model.get_input_embeddings(), model.config.get_text_config().vocab_size
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # so that the tokenizer takes "<audio>" for text, of which it has pieces
    with torch.no_grad(), whole(embed):
        for row, (text, token_id) in enumerate((model.config.new_tokens or {}).items()):
            ids = [piece for piece in backend.encode(text, add_special_tokens=False).ids if piece < num_rows]
            if pieces := [piece for piece in ids if piece != token_id]:
                new_tokens.rows[row] = mean_of_pieces(embed(torch.tensor(pieces)).float())


def _marks(config: ModelConfig) -> list[str]:
    return [token for block in config.media.values() for token in block.span]
