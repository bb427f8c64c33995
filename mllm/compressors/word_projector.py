"""Projects features to mixtures of word embeddings: what is heard in each stretch of them, by how likely it is.

Knows sizes and streams of features. Does not know which words these are, or how it learns to hear them.

    out = softmax(scores) @ said      scores = norm(linear(mean of a stretch) + mlp(whole stretch)) @ heard

What the LLM reads is thus made of what it knows, however little the projector has learned; and the mean over any part
of a stream is a bag of the words in it.

Shapes: N items, T features, D feature size, F features of a stretch, S = ceil(T / F) stretches, W words, H the LLM's
hidden size.
Source: LegoSLM (arXiv 2505.11352), whose words are the LLM's whole vocabulary and whose mixtures are not pooled. That
a linear map takes features to the words of a decoder that reads them, which is why there is one: Dar et al.
(arXiv 2209.02535), who read the weights of text decoders so.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class WordTable(nn.Module):
    """Holds what every word sounds like and which embedding it has.

    It is learned, or read off other models, before the first step, and held from then on (`mllm.model.trainables`).

    Args:
        in_size: D.
        num_words: W.
        out_size: H.
    """

    def __init__(self, *, in_size: int, num_words: int, out_size: int) -> None:
        super().__init__()
        self.heard = nn.Linear(in_size, num_words)
        self.said = nn.Linear(num_words + 1, out_size, bias=False)


class WordProjector(nn.Module):
    """Mixes words by how likely they are heard.

    The first of the W + 1 scores is that of nothing, which is most of speech; it has an embedding as well.

    Args:
        in_size: D.
        hidden_size: between the two layers of the part that is not linear.
        num_words: W.
        stretch_frames: F; the last stretch of an item is filled with zeros.
        out_size: H.
    """

    def __init__(self, *, in_size: int, hidden_size: int, num_words: int, stretch_frames: int, out_size: int) -> None:
        super().__init__()
        self.stretch_frames = stretch_frames
        whole_size = in_size * stretch_frames
        self.linear = nn.Linear(in_size, in_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(whole_size), nn.Linear(whole_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, in_size)
        )
        self.norm = nn.LayerNorm(in_size)
        self.nothing = nn.Linear(in_size, 1)
        self.word_table = WordTable(in_size=in_size, num_words=num_words, out_size=out_size)

    @property
    def num_words(self) -> int:
        """W."""
        return self.word_table.heard.out_features

    def scores(self, features: Tensor) -> Tensor:
        """Scores nothing and every word in each stretch: (N, T, D) -> (N, S, W + 1)."""
        filled = functional.pad(features, (0, 0, 0, -features.shape[1] % self.stretch_frames))
        stretches = filled.unflatten(1, (-1, self.stretch_frames))
        heard = self.norm(self.linear(stretches.mean(2)) + self.mlp(stretches.flatten(2)))
        return torch.cat([self.nothing(heard), self.word_table.heard(heard)], dim=-1)

    def count_stretches(self, lengths: Tensor) -> Tensor:
        """Counts the stretches of items of so many features: (N,) -> (N,)."""
        return (lengths + self.stretch_frames - 1) // self.stretch_frames

    def forward(self, features: Tensor) -> Tensor:
        """Projects (N, T, D) -> (N, T, H): all features of a stretch alike."""
        probabilities = self.scores(features).softmax(dim=-1, dtype=torch.float32)
        mixed = self.word_table.said(probabilities.to(features.dtype))
        return mixed.repeat_interleave(self.stretch_frames, dim=1)[:, : features.shape[1]]
