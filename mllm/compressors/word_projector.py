"""Projects features to mixtures of word embeddings: what is heard in each stretch of them, by how likely it is.

Knows sizes and streams of features. Does not know which words these are, or how it learns to hear them.

    out = softmax(scores) @ words      scores = Linear - gelu - Linear of a stretch's mean, for nothing and W words

What the LLM reads is thus made of what it knows, however little the projector has learned; and the mean over any part
of a stream is a bag of the words in it.

Shapes: N items, T features, D feature size, F features of a stretch, S = ceil(T / F) stretches, W words, H the LLM's
hidden size.
Source: LegoSLM (arXiv 2505.11352), whose words are the LLM's whole vocabulary and whose mixtures are not pooled.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class WordProjector(nn.Module):
    """Mixes words by how likely they are heard.

    The first of the W + 1 scores is that of nothing, which is most of speech; it has an embedding as well.

    Args:
        in_size: D.
        hidden_size: between the two layers that score.
        num_words: W.
        stretch_frames: F; the last stretch of an item is filled with zeros.
        out_size: H.
    """

    def __init__(self, *, in_size: int, hidden_size: int, num_words: int, stretch_frames: int, out_size: int) -> None:
        super().__init__()
        self.stretch_frames = stretch_frames
        self.norm = nn.LayerNorm(in_size)
        self.read = nn.Linear(in_size, hidden_size)
        self.score = nn.Linear(hidden_size, num_words + 1)
        self.words = nn.Linear(num_words + 1, out_size, bias=False)

    @property
    def num_words(self) -> int:
        """W."""
        return self.score.out_features - 1

    def scores(self, features: Tensor) -> Tensor:
        """Scores nothing and every word in each stretch: (N, T, D) -> (N, S, W + 1)."""
        # Before the norm, so that what fills a stretch is the same within a padded batch and at its end.
        filled = functional.pad(features, (0, 0, 0, -features.shape[1] % self.stretch_frames))
        stretches = self.norm(filled).unflatten(1, (-1, self.stretch_frames)).mean(2)
        return self.score(functional.gelu(self.read(stretches)))

    def count_stretches(self, lengths: Tensor) -> Tensor:
        """Counts the stretches of items of so many features: (N,) -> (N,)."""
        return (lengths + self.stretch_frames - 1) // self.stretch_frames

    def forward(self, features: Tensor) -> Tensor:
        """Projects (N, T, D) -> (N, T, H): all features of a stretch alike."""
        probabilities = self.scores(features).softmax(dim=-1, dtype=torch.float32)
        mixed = self.words(probabilities.to(features.dtype))
        return mixed.repeat_interleave(self.stretch_frames, dim=1)[:, : features.shape[1]]
