"""Runs `mllm chat`: answers questions about files one after the other, with a model that is loaded once."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mllm.budget import MEDIA, Budget
from mllm.config.decoding_options import DecodingOptions
from mllm.config.long_audio import LongAudioOptions
from mllm.config.model_options import ModelOptions

if TYPE_CHECKING:
    from mllm.inference.chat import ChatSession

SUMMARY = "Talk with a model about images, audio and videos, loading it once."
PROMPT = "> "
HELP = """\
/image PATH     show an image with the next question; also /audio PATH and /video PATH
/budget BUDGET  answer at another budget from now on, such as image=16; alone it says the budget
/files          list the files of the conversation
/ask            ask the default question, such as for a transcript
/clear          forget what was said and shown
/quit           end, as the end of the input does
//text          a question that begins with a slash"""


@dataclass(frozen=True, kw_only=True)
class Settings(DecodingOptions, LongAudioOptions, ModelOptions):
    """Answer one question after the other, from the terminal or from a pipe; lines that begin with / are commands."""

    image: list[str] = field(default_factory=list)
    """An image file to begin with; may be given several times."""
    audio: list[str] = field(default_factory=list)
    """An audio file to begin with, or a video whose audio is meant; may be given several times."""
    video: list[str] = field(default_factory=list)
    """A video file to begin with; may be given several times."""
    budget: str = ""
    """Soft tokens to begin with, e.g. "image=64"; when left out the most the model was trained on."""
    history: bool = True
    """Shows the model what was said before; with false every question stands alone behind the files, as models that
    were trained on single questions want it."""
    max_mismatch_seconds: float | None = 0.08
    """Most seconds by which an audio and a video of one name may differ in length; null never compares."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.parse(self.budget)


def run(settings: Settings) -> int:
    """Talk until the input ends; 1 where a line from a pipe could not be answered."""
    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, quiet_loading
    from mllm.evaluation.request_costs import ModelCosts
    from mllm.inference.answerer import Answerer, Decoding
    from mllm.inference.chat import ChatSession
    from mllm.media import MediaLoader
    from mllm.router.router import fitted_router

    decoding = Decoding.of(settings)
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
        router=fitted_router(folder),  # the budget may become auto
        request_costs=ModelCosts(model, processor, folder),
    )
    session = ChatSession(answerer, Budget.parse(settings.budget), settings.history)
    for medium in MEDIA:
        for path in getattr(settings, medium):
            session.add(medium, path)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console(stderr=True).print("/help lists commands; /quit ends")
    num_failed = converse(session, _lines(is_terminal))
    return 1 if num_failed and not is_terminal else 0


def converse(session: "ChatSession", lines: Iterable[str]) -> int:
    """Answer line by line; what fails is told and ends nothing, and Ctrl-C stops only the answer.

    Returns:
        How many lines failed.
    """
    import torch

    from mllm.commands.terminal import console

    errors = console(stderr=True)
    num_failed = 0
    for line in lines:
        try:
            if not _take(session, line.strip()):
                break
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            errors.print("stopped")
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            num_failed += 1
            errors.print(" ".join(str(error).split()), soft_wrap=True)
    return num_failed


def _take(session: "ChatSession", line: str) -> bool:
    """Do what a line says; false where it ends the chat."""
    from mllm.commands.terminal import console

    if line.startswith("/") and not line.startswith("//"):
        word, _, rest = line[1:].partition(" ")
        if word == "quit":
            return False
        if said := _command(session, word, rest.strip()):
            console(stderr=True).print(said, soft_wrap=True)
    elif line:
        _ask(session, line.removeprefix("/") if line.startswith("//") else line)
    return True


def _command(session: "ChatSession", word: str, rest: str) -> str:
    """Run one command, and return what to say.

    Raises:
        ValueError: no such command, or one that lacks something or has too much.
    """
    commands: dict[str, Callable[[], str]] = {
        **{medium: lambda medium=medium: _add(session, medium, rest) for medium in MEDIA},
        "budget": lambda: _budget(session, rest),
        "files": lambda: "\n".join(f"{medium} {path}" for medium, path in session.files) or "no files",
        "ask": lambda: _ask(session, None),
        "clear": lambda: _clear(session),
        "help": lambda: HELP,
    }
    if word not in commands:
        raise ValueError(f"there is no command /{word}; there are {', '.join(f'/{name}' for name in commands)}, /quit")
    if rest and word not in (*MEDIA, "budget"):
        raise ValueError(f"/{word} takes nothing behind it, got {rest!r}")
    return commands[word]()


def _add(session: "ChatSession", medium: str, path: str) -> str:
    if not path:
        raise ValueError(f"/{medium} needs the path of a file")
    session.add(medium, path)
    return f"added {medium} {path}"


def _budget(session: "ChatSession", text: str) -> str:
    if text:
        session.set_budget(text)
    return f"budget: {session.budget or 'the most the model was trained on'}"


def _clear(session: "ChatSession") -> str:
    session.clear()
    return "cleared"


def _ask(session: "ChatSession", text: str | None) -> str:
    """Write the answer as it comes; return what it took."""
    from mllm.commands.terminal import console, facts_of_answers, piece_writer
    from mllm.data.json_lines import unwritable

    if text is not None and (problem := unwritable(text)):
        raise ValueError(f"the question is {problem}")
    answer = session.ask(text, on_text=piece_writer())
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in facts_of_answers([answer], is_open=session.budget.is_open):
        console(stderr=True).print(line)
    return ""


def _lines(is_terminal: bool) -> Iterator[str]:
    """Yield the lines of the standard input, with a prompt where somebody types them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one line that is not UTF-8 must not end the chat
    if not is_terminal:
        yield from sys.stdin
        return
    import readline  # noqa: F401  (arrow keys and the lines before, for `input`)

    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            sys.stdout.write("\n")
            return
