"""Runs `mllm generate`: answers a question about files, word by word, several about the same files, or a list."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mllm.budget import Budget
from mllm.config.checks import check_at_least
from mllm.config.decoding_options import DecodingOptions
from mllm.config.long_audio import LongAudioOptions
from mllm.config.model_options import ModelOptions

if TYPE_CHECKING:
    from mllm.inference.answerer import Answer, Answerer
    from mllm.inference.request_list import AnsweredRequest, ListedRequest, RefusedRequest

SUMMARY = "Answer a question about images, audio and videos at a budget, or a list of them."
MAX_REFUSED_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Settings(DecodingOptions, LongAudioOptions, ModelOptions):
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
    inputs: str | None = None
    """A list of requests to answer in place of one, a JSON object per line with text, image, audio, video, budget and
    id, paths relative to its folder. Answers are written as JSON lines in its order."""
    batch_size: int = 8
    """Most requests of a list that are answered together."""
    timing: bool = False
    """Also print the milliseconds of encoder, prefill and decoding. The request is run once before without being
    measured, since the first one also pays for what a process does only once."""
    max_mismatch_seconds: float | None = 0.08
    """Most seconds by which an audio and a video of one name may differ in length; null never compares."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs is not None:
            for key in ("text", "image", "audio", "video", "timing"):
                if getattr(self, key):
                    raise ValueError(f"--inputs brings its own questions and files; leave out --{key}")
        elif not (self.text or self.image or self.audio or self.video):
            raise ValueError("nothing to answer: give --text, --image, --audio or --video, or --inputs")
        elif self.batch_size != 8:
            raise ValueError(f"--batch_size is {self.batch_size}; it goes with --inputs")
        check_at_least(self, ["batch_size"])
        Budget.parse(self.budget)


def run(settings: Settings) -> int:
    """Answers, and says what was used; 1 where a line of a list could not be answered."""
    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, facts_of_answers, quiet_loading
    from mllm.evaluation.request_costs import ModelCosts
    from mllm.inference.answerer import Answerer, Decoding
    from mllm.inference.request_list import ListedRequest, read_request_list
    from mllm.media import MediaLoader
    from mllm.router.router import fitted_router, router_for

    decoding = Decoding.of(settings)
    requests = None if settings.inputs is None else read_request_list(settings.inputs)
    quiet_loading()
    model, processor = load_for(settings)
    loader = MediaLoader(gray=True, max_mismatch_seconds=settings.max_mismatch_seconds, limits=settings.limits)
    default, folder = Budget.parse(settings.budget), settings.model_folder
    named = [one.budget for one in requests or () if isinstance(one, ListedRequest) and one.budget is not None]
    wants_router = any(budget.auto is not None for budget in named)  # without one, those lines alone are refused
    answerer = Answerer(
        model,
        processor,
        decoding,
        settings.batch_size,
        loader=loader,
        long_audio=settings.read_long_audio(),
        router=router_for(folder, [default]) or (fitted_router(folder) if wants_router else None),
        request_costs=ModelCosts(model, processor, folder),
    )
    if requests is not None:
        return _answer_list(answerer, requests, default)
    for line in facts_of_answers(_answer(answerer, settings), is_open=default.is_open):
        console(stderr=True).print(line)
    return 0


def _answer(answerer: "Answerer", settings: Settings) -> "list[Answer]":
    """Answers the questions about the files, and writes the answers."""
    from mllm.commands.terminal import piece_writer

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
        answers = [ask(on_text=piece_writer(), timed=settings.timing)]
        sys.stdout.write("\n")
    sys.stdout.flush()
    return answers


def _answer_list(answerer: "Answerer", requests: "Sequence[ListedRequest | RefusedRequest]", budget: Budget) -> int:
    """Writes what became of each request as a line of JSON, and at the end which lines were not answered."""
    from mllm.commands.terminal import console, progress_bar
    from mllm.inference.request_list import RefusedRequest, answer_requests

    out, refused = sys.stdout, []  # the bar takes the name sys.stdout where it draws
    with progress_bar() as show:
        for done, result in enumerate(answer_requests(answerer, requests, budget), start=1):
            out.write(json.dumps(_line(result), ensure_ascii=False) + "\n")
            out.flush()
            if isinstance(result, RefusedRequest):
                refused.append(result)
            if not out.isatty():
                show("answers", done, len(requests))
    errors = console(stderr=True)
    for result in refused[:MAX_REFUSED_SHOWN]:
        errors.print(f"line {result.line_number}: {result.reason}", soft_wrap=True)
    if len(refused) > MAX_REFUSED_SHOWN:
        errors.print(f"and {len(refused) - MAX_REFUSED_SHOWN} more lines, whose answer is an error")
    errors.print(f"answered {len(requests) - len(refused)} of {len(requests)} requests")
    return 1 if refused else 0


def _line(result: "AnsweredRequest | RefusedRequest") -> dict[str, Any]:
    from mllm.inference.request_list import RefusedRequest

    line: dict[str, Any] = {"line": result.line_number}
    if result.id is not None:
        line["id"] = result.id
    if isinstance(result, RefusedRequest):
        return {**line, "error": result.reason}
    answer = result.answer
    return {
        **line,
        "answer": answer.text,
        "budget": str(answer.budget),
        "tokens": dict(answer.tokens),
        "is_trained": answer.is_trained,
        "prompt_tokens": answer.num_prompt_tokens,
        "new_tokens": answer.num_new_tokens,
        "is_cut": answer.is_cut,
        "num_discarded": len(answer.discarded),
    }
