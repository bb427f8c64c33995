"""Runs `mllm bench`: measures what each budget of a model costs on this machine."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mllm.budget import MEDIA, Budget
from mllm.config.model import check_at_least
from mllm.config.model_options import ModelOptions

if TYPE_CHECKING:
    from mllm.evaluation.bench import Measured

SUMMARY = "Measure what each budget of a model costs here: tokens, FLOPs, cache, memory, time."


@dataclass(frozen=True, kw_only=True)
class Settings(ModelOptions):
    """Answer the same requests at several budgets, in turn, and show what each of them costs."""

    budgets: list[str] | str = field(default_factory=list)
    """Budgets as a list, or as one text with `;` between them; when left out those that were trained, at most 8."""
    image: list[str] = field(default_factory=list)
    """An image file of the request; may be given several times. Without any file the media are made up."""
    audio: list[str] = field(default_factory=list)
    """An audio file of the request; may be given several times."""
    video: list[str] = field(default_factory=list)
    """A video file of the request; may be given several times."""
    media: list[Literal["image", "audio", "video"]] = field(default_factory=list)
    """Media that are made up; when left out all that the budgets name, or else all that the model takes."""
    seconds: float = 6.0
    """Length of made-up audio and videos, in seconds."""
    text: str | None = None
    """The question; a usual one when left out."""
    batch_size: int = 1
    """Number of requests that are answered together."""
    new_tokens: int = 16
    """Number of tokens that are decoded for every answer, whatever the model says."""
    num_beams: int = 1
    """Number of beams; 1 is greedy."""
    repeats: int = 7
    """Number of measurements of every budget."""
    warmup: int = 1
    """Number of rounds before those, which are not counted."""
    out: str | None = None
    """Folder that gets bench.json and bench.png; when left out results are only shown."""
    threads: int | None = None
    """Number of CPU threads; when left out as many as torch takes."""

    def __post_init__(self) -> None:
        check_at_least(self, ("batch_size", "new_tokens", "num_beams", "repeats", "threads"))
        check_at_least(self, ["warmup"], 0)
        if self.seconds <= 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")
        if self.media and (self.image or self.audio or self.video):
            raise ValueError("media makes up media, and files are given; leave one of them out")
        self.read_budgets()  # refuses what is no budget before anything is loaded

    def read_budgets(self) -> list[Budget]:
        """Reads the budgets, each once.

        Raises:
            ValueError: one that is none.
        """
        texts = self.budgets.split(";") if isinstance(self.budgets, str) else self.budgets
        return list(dict.fromkeys(Budget.parse(text) for text in texts))


def run(settings: Settings) -> int:
    """Measures and shows the costs, and writes them if there is a folder to write to."""
    from pathlib import Path

    import torch

    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, progress_bar, quiet_loading
    from mllm.evaluation.bench import bench, default_budgets, requests, write
    from mllm.inference.answerer import Decoding

    quiet_loading()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, processor = load_for(settings)
    budgets = settings.read_budgets()
    # Media are loaded once, and anew for budgets at which other images are encoded.
    loaded = {
        seen: _media(settings, processor, seen) for seen in dict.fromkeys(map(_seen, budgets)) or {Budget(): None}
    }
    budgets = budgets or default_budgets(processor, [item.medium for item in loaded[Budget()]])
    batches = {seen: requests(processor, media, settings.text, settings.batch_size) for seen, media in loaded.items()}
    with progress_bar() as show:
        results = bench(
            model,
            processor,
            {budget: batches[_seen(budget)] for budget in budgets},
            decoding=Decoding(settings.num_beams, settings.new_tokens),
            repeats=settings.repeats,
            warmup=settings.warmup,
            progress=lambda done, total: show("runs", done, total),
        )
    facts = _facts(settings, model)
    console().print(_table(results, facts))
    if settings.out is not None:
        write(results, facts, Path(settings.out))
        console().print(f"written to {settings.out}")
    return 0


def _seen(budget: Budget) -> Budget:
    """Keeps of a budget what decides which images are encoded."""
    return Budget(max_tiles=budget.max_tiles, max_image_tokens=budget.max_image_tokens)


def _media(settings: Settings, processor: Any, seen: Budget) -> Any:
    from mllm.evaluation.bench import made_up_media
    from mllm.inference.answerer import request

    files = {"image": settings.image, "audio": settings.audio, "video": settings.video}
    if any(files.values()):
        return processor.load_media(request(files, settings.text or "what is this?")[0], budgets=[seen])
    named = {medium for budget in settings.read_budgets() for medium in budget.media}
    wanted = settings.media or [medium for medium in MEDIA if medium in (named or processor.placeholder_ids)]
    return made_up_media(processor, wanted, settings.seconds, budgets=[seen])


def _facts(settings: Settings, model: Any) -> dict[str, Any]:
    """Gathers what the figures depend on beside the budgets."""
    import torch

    on_gpu = model.device.type == "cuda"
    return {
        "model": settings.model,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": settings.dtype,
        "merge_adapter": settings.merge_adapter,
        "audio_padding": settings.audio_padding,
        "torch": torch.__version__,
        "batch_size": settings.batch_size,
        "new_tokens": settings.new_tokens,
        "num_beams": settings.num_beams,
        "repeats": settings.repeats,
    }


def _table(results: "list[Measured]", facts: dict[str, Any]) -> Any:
    """Makes a table with a line per budget; times are medians with the middle half of the repeats."""
    from rich.table import Table

    title = f"{facts['model']}: {facts['device']}, {facts['dtype']}, batch {facts['batch_size']}"
    caption = (
        f"medians of {facts['repeats']} (middle half); {facts['new_tokens']} new tokens; GFLOP and KV of one request"
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", pad_edge=False)
    columns = ("budget", "soft tokens", "prompt", "GFLOP", "KV MB", "encoder ms", "prefill ms", "decode ms", "total ms")
    for name in (*columns, "quicker", "by FLOP", *(["peak MB"] if results[0].peak_bytes else [])):
        table.add_column(name, justify="left" if name == "budget" else "right")
    for one in results:
        table.add_row(*_cells(one, results[0]))
    return table


def _cells(one: "Measured", first: "Measured") -> list[str]:
    from statistics import median

    from mllm.evaluation.bench import quartiles
    from mllm.inference.timing import PHASES

    answer, cost = one.answer, one.cost
    times = [quartiles(one.milliseconds(phase)) for phase in (*PHASES, "total_ms")]
    gain = median(first.milliseconds("total_ms")) / times[-1][1]
    by_flops = "-" if cost is None or first.cost is None else f"{first.cost.total / cost.total:.2f}x"
    return [
        f"{str(one.budget) or 'largest'}{'' if answer.is_trained else ' (untrained)'}",
        ", ".join(f"{medium} {count}" for medium, count in answer.tokens.items()) or "none",
        str(answer.num_prompt_tokens),
        "-" if cost is None else f"{cost.total / 1e9:,.2f}",
        "-" if cost is None else f"{cost.kv_bytes / 1e6:,.2f}",
        *(f"{middle:,.1f} ({low:,.1f}-{high:,.1f})" for low, middle, high in times),
        f"{gain:.2f}x",
        by_flops,
        *([f"{one.peak_bytes / 1e6:,.0f}"] if first.peak_bytes else []),
    ]
