"""Reads off the decoder of a speech model which of its words each feature of its encoder says.

Knows Whisper's decoder. Does not know LLMs, projectors or captions.

A decoder attends to features and adds to what it will say next; the last thing it does is to compare that with the
embeddings of its words. What its cross-attention writes is linear in the feature that is attended to, so

    words said by a feature  ~  norm(sum over layers of out(value(feature))) @ embeddings

with no decoder run and nothing learned. That is crude: which word it is stands out, but not whether a word begins
there. It knows, however, all of the decoder's words, most of which no few thousand captions hold.

Shapes: D the encoder's feature size, V words of the decoder.
Source: Dar et al., Analyzing Transformers in Embedding Space (arXiv 2209.02535), who read off text decoders so.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from mllm.checkpoints.families import Layout
from mllm.checkpoints.pretrained import load_checked, read_config, read_tokenizer
from mllm.training.initialization.word_choice import space_mark, spoken

_LAYOUT = Layout(renamed=(("model.decoder.", ""), ("decoder.", "")), beside=("model.encoder.", "encoder.", "proj_out."))


@dataclass(frozen=True)
class WordDecoder:
    """Says how the features of an encoder are read as words.

    Args:
        weight: (D, D), bias: (D,): what the cross-attention writes, all layers together.
        norm: weight (D,) and bias (D,) of the decoder's last norm.
        embeddings: (V, D) of its words.
        rows: of the embeddings, by word; a word that begins with a space stands for one with a space before it.
    """

    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor]
    embeddings: Tensor
    rows: dict[str, int]


def read_word_decoder(reference: str) -> WordDecoder:
    """Read the decoder of a whole Whisper, in float32.

    Args:
        reference: a folder or a name on the hub.

    Raises:
        ValueError: another model than Whisper, or tensors of the decoder that are missing or of another shape.
        OSError: a source that is neither a folder nor to be had from the hub.
    """
    config = read_config(reference)
    if config.model_type != "whisper" or not config.is_encoder_decoder:
        raise ValueError(
            f"train.word_decoder {reference} is a {config.model_type}; allowed: a whole Whisper, with its decoder"
        )
    decoder: Any = load_checked(WhisperDecoder, reference, config, _LAYOUT, dtype=torch.float32)
    tokenizer = read_tokenizer(reference)
    weight, bias = torch.zeros(config.d_model, config.d_model), torch.zeros(config.d_model)
    with torch.no_grad():
        for layer in decoder.layers:
            attention = layer.encoder_attn
            weight += attention.out_proj.weight @ attention.v_proj.weight
            bias += attention.out_proj(attention.v_proj.bias)
    mark = space_mark(tokenizer)
    special = set(tokenizer.all_special_ids)
    rows = {spoken(word, mark): row for word, row in tokenizer.get_vocab().items() if row not in special}
    norm = (decoder.layer_norm.weight.detach(), decoder.layer_norm.bias.detach())
    return WordDecoder(weight, bias, norm, decoder.embed_tokens.weight.detach(), rows)
