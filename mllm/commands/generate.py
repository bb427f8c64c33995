"""Runs `mllm generate`: answers a question about files, word by word, or several questions about the same files."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from mllm.budget import Budget
from mllm.config.long_audio import LongAudioOptions
from mllm.config.model_options import ModelOptions

if TYPE_CHECKING:
    from mllm.inference.answerer import Answer

SUMMARY = "Answer a question about images, audio and videos at a budget."


@dataclass(frozen=True, kw_only=True)
class Settings(LongAudioOptions, ModelOptions):
    """Answer questions about files; without a text, speech is transcribed and an image described."""

    text: list[str] = field(default_factory=list)
    """The question. Given several times, all are answered, a line each; the files are encoded and read once for all."""
    image: list[str] = field(default_factory=list)
    """An image file; may be given several times."""
    audio: list[str] = field(default_factory=list)
    """An audio file, or a video whose audio is meant; may be given several times. If the budget names audio and there
    is none, the audio of the videos is used."""
    video: list[str] = field(default_factory=list)
    """A video file; may be given several times."""
    budget: str = ""
    """Soft tokens, e.g. "image=64", "audio=/4,video=/2", "total<=256", or "auto", which a fitted router chooses; when
    left out the most the model was trained on."""
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
    timing: bool = False
    """Also print the milliseconds of encoder, prefill and decoding. The request is run once before without being
    measured, since the first one also pays for what a process does only once."""
    max_mismatch_seconds: float | None = 0.08
    """Most seconds by which an audio and a video of one name may differ in length; null never compares."""
    static_cache: bool = False
    """Decode with a cache of a fixed size, which CUDA replays as a graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.text or self.image or self.audio or self.video):
            raise ValueError("nothing to answer: give --text, --image, --audio or --video")
        Budget.parse(self.budget)


def run(settings: Settings) -> int:
    """Answers, and says what was used."""
    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, quiet_loading
    from mllm.evaluation.request_costs import ModelCosts
    from mllm.inference.answerer import Answerer, Decoding
    from mllm.media import MediaLoader
    from mllm.router.router import router_for

    decoding = Decoding(
        settings.num_beams,
        settings.max_new_tokens,
        settings.temperature,
        settings.seed,
        settings.length_penalty,
        settings.static_cache,
    )
    quiet_loading()
    model, processor = load_for(settings)
    loader = MediaLoader(gray=True, max_mismatch_seconds=settings.max_mismatch_seconds, limits=settings.limits)
    folder = settings.model_folder
    answerer = Answerer(
        model,
        processor,
        decoding,
        loader=loader,
        long_audio=settings.read_long_audio(),
        router=router_for(folder, [Budget.parse(settings.budget)]),
        request_costs=ModelCosts(model, processor, folder),
    )
    files = {"image": settings.image, "audio": settings.audio, "video": settings.video}
    if len(settings.text) > 1:
        ask_all = partial(answerer.answer_questions, settings.text, **files, budget=settings.budget)
        if settings.timing:
            ask_all()
        answers = ask_all(timed=settings.timing)
        sys.stdout.write("".join(" ".join(answer.text.split()) + "\n" for answer in answers))
    else:
        text = settings.text[0] if settings.text else None
        ask = partial(answerer.answer, text, **files, budget=settings.budget)
        if settings.timing:
            ask()
        answers = [ask(on_text=_writer(), timed=settings.timing)]
        sys.stdout.write("\n")
    sys.stdout.flush()
    for line in facts(answers, is_open=Budget.parse(settings.budget).is_open):
        console(stderr=True).print(line)
    return 0


def facts(answers: Sequence["Answer"], *, is_open: bool) -> list[str]:
    """Writes lines about answers to questions about the same files: the tokens of each, and the timing of all.

    Args:
        is_open: their budgets were chosen for them, and are told.
    """
    lines = []
    for answer in answers:
        used = ", ".join(f"{medium} {count}" for medium, count in answer.tokens.items()) or "none"
        trained = "" if answer.is_trained else " (this budget was not trained)"
        shared = f" ({answer.num_shared_tokens} of them shared)" if answer.num_shared_tokens else ""
        prompt = f"prompt {answer.num_prompt_tokens}{shared}"
        before = ", ".join(str(one.budget) for one in answer.discarded)
        chosen = f" at {answer.budget}{f', after {before}' if before else ''}" if is_open else ""
        lines.append(f"soft tokens: {used}{chosen}{trained}; {prompt}, answer {answer.num_new_tokens}")
    if (time := answers[0].timing) is not None:
        of = f" of all {len(answers)} together" if len(answers) > 1 else ""
        lines.append(
            f"milliseconds{of}: encoder {time.encoder_ms:.1f}, prefill {time.prefill_ms:.1f}, "
            f"decode {time.decode_ms:.1f}"
        )
    return lines


def _writer() -> Callable[[str], None]:
    """Makes a function that writes pieces as they come, without the blank before the first of them."""
    begun = False

    def write(piece: str) -> None:
        nonlocal begun
        sys.stdout.write(piece if begun else piece.lstrip())
        sys.stdout.flush()
        begun = begun or bool(piece.strip())

    return write
