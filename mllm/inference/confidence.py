"""Keeps how probable the tokens of an answer were, from logits that `generate` makes anyway.

Knows logits and the library's hook for them. Does not know models, prompts or what a confidence is good for.

Probabilities are those among the tokens that may be said, before a temperature: what is suppressed does not count. A
step keeps one row of logits per answer, or the candidates of a beam search, and never those of all steps.

Shapes: B answers, C beams of each, V tokens of the vocabulary, T steps, P tokens of the prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class TokenProbabilities(LogitsProcessor):
    """Collects log-probabilities; `generate` calls it with the logits of every step and gets them back as they are.

    Args:
        num_candidates: most tokens of one beam that a beam search may go on with at a step; 0 without beams.
    """

    def __init__(self, num_candidates: int = 0) -> None:
        self._num_candidates = num_candidates
        self._last: Tensor | None = None
        self._chosen: list[Tensor] = []
        self._candidates: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the step's log-probabilities: (B, V) logits of one step, or (B * C, V) of one with beams."""
        log_probabilities = scores.float().log_softmax(dim=-1)
        if self._num_candidates:
            count = min(self._num_candidates, scores.shape[-1])
            self._candidates.append(torch.topk(log_probabilities, count, dim=-1))
        else:
            # Which token was chosen is known with the next step alone: sampling comes behind this hook.
            if self._last is not None:
                self._chosen.append(self._last.gather(1, input_ids[:, -1:]))
            self._last = log_probabilities
        return scores

    def of_answers(self, ids: Tensor, num_prompt_tokens: int, beam_indices: Tensor | None = None) -> Tensor:
        """Return the log-probabilities (B, T) of the tokens of finished answers; what stands behind an end is no token.

        Args:
            ids: (B, P + T) of `generate`.
            beam_indices: (B, T) of `generate` with beams: the row of each step's logits that a token came from, below 0
                behind the end.
        """
        new_ids = ids[:, num_prompt_tokens:]
        if beam_indices is None:
            if self._last is None:
                return new_ids.new_zeros(new_ids.shape, dtype=torch.float32)
            last = self._last.gather(1, new_ids[:, len(self._chosen) : len(self._chosen) + 1])
            return torch.cat([*self._chosen, last], dim=1)
        steps = []
        for step in range(beam_indices.shape[1]):
            values, tokens = (kept[beam_indices[:, step].clamp(min=0)] for kept in self._candidates[step])
            matches = tokens == new_ids[:, step : step + 1]
            # A chosen token that is not among the kept ones is as probable as the last of them: only equals are cut.
            steps.append(values.masked_fill(~matches, -torch.inf).amax(dim=1).where(matches.any(dim=1), values[:, -1]))
        return torch.stack(steps, dim=1)


def confidence_of(log_probabilities: Sequence[float]) -> tuple[float, float]:
    """Return the smallest probability of any token of an answer, and the mean of their log-probabilities."""
    values = torch.tensor(log_probabilities, dtype=torch.float64)
    return float(values.min().exp()), float(values.mean())
