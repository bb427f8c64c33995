"""Gives the synthetic LLM a head start: what any large LLM has long learnt, put into initial weights of a small one.

Knows the weights of a Llama with attention biases and the words for places. Does not know what the LLM will read.

Three things take a small transformer tens of millions of tokens to find by itself: heads that look at the words just
before (without them the second word of "circle red" does not know what it is the colour of; Olsson et al. 2022, arXiv
2209.11895, tell how late they appear), an order among the words for columns and rows, and that yes is not no: as long
as it can only guess, training pulls the two words together (measured: to a cosine of 0.98 after 3,600 steps), and with
them goes the gradient that could tell them apart. All of it is only a beginning: every weight trains.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mllm.synthetic.images.questions import COLUMN_WORDS, ROW_WORDS
from mllm.synthetic.tokenizer import word_id

# (distance to the word looked at, sharpness) of the heads of the first layer; an object is told in five words.
PREVIOUS_HEADS = ((1.0, 33.0), (1.0, 33.0), (2.0, 20.0), (3.0, 20.0), (4.0, 20.0), (2.5, 6.0))
COPY_STRENGTH = 0.7  # of a word that such a head copies, relative to the word itself
COORDINATE_STEP = 0.1  # between neighbouring columns or rows, where a word has a length of about 0.8


@torch.no_grad()
def initialise(model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Change a randomly initialised model in place."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # Smaller where a layer writes into the residual stream, so that bags are not drowned at the start.
            weight.mul_(1.0 / math.sqrt(2 * model.config.num_hidden_layers))
    look_back(model)
    order_coordinates(model.model.embed_tokens.weight, tokenizer)
    part_answers(model.model.embed_tokens.weight, tokenizer)


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Make every head of the first layer look back by its distance, whatever stands there, and copy a part of it.

    With constant queries and keys the rotary score is sum_f cos(theta_f (delta - distance)), largest where delta, the
    number of positions looked back, is the distance. Each head copies a subspace of its own.
    """
    attention: Any = model.model.layers[0].self_attn
    frequencies: Tensor = model.model.rotary_emb.inv_freq
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.zero_()
    # Queries and keys come from the biases alone: the same at every position until the rotary embedding turns them.
    biases = zip(*(_rotary_biases(frequencies, *head) for head in PREVIOUS_HEADS), strict=True)
    for projection, bias in zip((attention.q_proj, attention.k_proj), biases, strict=True):
        projection.bias.copy_(torch.cat(bias))
    basis, _ = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size))
    attention.v_proj.weight.copy_(basis.T)
    loudness = model.model.embed_tokens.weight.square().mean().sqrt()  # the norm before attention divides by it
    attention.o_proj.weight.copy_(COPY_STRENGTH * loudness * basis)


def _rotary_biases(frequencies: Tensor, distance: float, sharpness: float) -> tuple[Tensor, Tensor]:
    """Compute the constant query and key of a head whose score is largest `distance` positions back."""
    angles = distance * frequencies
    key = torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])
    return math.sqrt(sharpness) * torch.cat([angles.cos(), -angles.sin()]), math.sqrt(sharpness) * key


@torch.no_grad()
def order_coordinates(table: Tensor, tokenizer: Any) -> None:
    """Move the embeddings (V, H) of column and row words along one direction each, in their order."""
    directions, _ = torch.linalg.qr(torch.randn(table.shape[1], 2))
    for words, direction in zip((COLUMN_WORDS, ROW_WORDS), directions.T, strict=True):
        for rank, word in enumerate(words):
            table[word_id(tokenizer, word)] += COORDINATE_STEP * (rank - (len(words) - 1) / 2) * direction


@torch.no_grad()
def part_answers(table: Tensor, tokenizer: Any) -> None:
    """Make the embedding of "no" the opposite of that of "yes"."""
    table[word_id(tokenizer, "no")] = -table[word_id(tokenizer, "yes")]
