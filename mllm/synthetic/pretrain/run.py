"""Makes the frozen synthetic parts, the ones that lie in `assets`, from nothing.

Knows the four trainings and where each writes. Does not know how any of them works.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

Part = Literal["audio", "lips", "vision", "llm"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Say which parts are made, and where they go; the shipped ones came from the defaults."""

    out: str
    """Folder that gets a folder per part and a log beside or in it."""
    parts: list[Part] = field(default_factory=lambda: list(get_args(Part)))
    """Parts to train."""
    seed: int = 0
    """Random seed of the initial weights and of the text, speech, lips and images."""
    llm_steps: int = 12000
    """Number of steps of the LLM's schedule."""
    llm_seconds: float | None = None
    """Finish the LLM's schedule within this time in seconds, even when fewer steps fit into it."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"parts is empty; name at least one of {', '.join(get_args(Part))}")


def pretrain(settings: PretrainConfig) -> dict[str, dict[str, float]]:
    """Make the parts in turn, each with one thread or as many as torch is given.

    Returns:
        What each training measured last, by part.

    Raises:
        ImportError: the speech synthesiser is not installed; the message has the pip line.
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    trainings: dict[Part, Callable[[], dict[str, float]]] = {
        "audio": lambda: _audio(out, settings),
        "lips": lambda: _lips(out, settings),
        "vision": lambda: _vision(out, settings),
        "llm": lambda: _llm(out, settings),
    }
    return {part: trainings[part]() for part in settings.parts}


def _audio(out: Path, settings: PretrainConfig) -> dict[str, float]:
    from mllm.synthetic.pretrain.audio import AUDIO_RECIPE, pretrain_audio

    return pretrain_audio(out, recipe=replace(AUDIO_RECIPE, seed=settings.seed))


def _lips(out: Path, settings: PretrainConfig) -> dict[str, float]:
    from mllm.synthetic.pretrain.lips import LIP_RECIPE, pretrain_lips

    return pretrain_lips(out, recipe=replace(LIP_RECIPE, seed=settings.seed))


def _vision(out: Path, settings: PretrainConfig) -> dict[str, float]:
    from mllm.synthetic.pretrain.vision import pretrain_vision

    return pretrain_vision(out / "vision", seed=settings.seed)


def _llm(out: Path, settings: PretrainConfig) -> dict[str, float]:
    from mllm.synthetic.pretrain.llm import pretrain_llm

    return pretrain_llm(
        out / "llm",
        seed=settings.seed,
        steps=settings.llm_steps,
        tokens_per_step=2048,
        time_limit_seconds=settings.llm_seconds,
    )
