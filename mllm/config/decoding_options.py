"""Says how the tokens of an answer are chosen: the options that commands which answer have in common."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Holds the options of a command that say how the tokens of an answer are chosen."""

    num_beams: int = 1
    """Number of beams; 1 is greedy. Beams are deterministic, and the LLM's generation config, which may sample, is not
    followed."""
    length_penalty: float = 1.0
    """Power of the length that a beam's sum of log-probabilities is divided by."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    temperature: float | None = None
    """Temperature to sample at, instead of taking the best token."""
    seed: int = 0
    """Random seed for sampling."""
    static_cache: bool = False
    """Decode with a cache of a fixed size, which CUDA replays as a graph."""
