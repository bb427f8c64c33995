"""Runs `mllm lmms-eval`: lmms-eval's benchmarks at several budgets, each question encoded once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.budget import Budget
from mllm.config.model import check_at_least
from mllm.config.model_options import ModelOptions
from mllm.utils.extras import install_line

SUMMARY = "Run benchmarks of lmms-eval (extra lmms) over budgets, into one table."
RESULTS = "lmms_eval"
"""The folder of results inside a model's folder."""


@dataclass(frozen=True, kw_only=True)
class Settings(ModelOptions):
    """Run tasks of lmms-eval at several budgets. Needs the extra lmms; see docs/evaluation.md."""

    tasks: list[str]
    """Names of lmms-eval's tasks, groups or tags; `lmms-eval tasks list` shows them."""
    budgets: str | list[str]
    """Budgets, as a list or parted by ";", e.g. "image=64;image=16;image=4"."""
    include_path: str | None = None
    """Folder with your tasks, beside those of lmms-eval."""
    out: str | None = None
    """Folder of the results; when left out `lmms_eval` inside the model's folder, or of a checkpoint
    `lmms_eval-checkpoint-...` inside its run."""
    limit: int | None = None
    """Number of questions of each task, from the first; all when left out."""
    num_fewshot: int | None = None
    """Number of examples before each question; when left out what the task says."""
    gen_kwargs: str | None = None
    """Decoding, instead of what tasks say, e.g. "max_new_tokens=32,num_beams=3"."""
    batch_size: int = 1
    """Number of questions answered together; each is answered at all budgets at once."""
    log_samples: bool = False
    """Also write every question and answer."""

    def __post_init__(self) -> None:
        if not self.parsed_budgets:
            raise ValueError("budgets is empty; name at least one, such as image=64")
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one")
        check_at_least(self, ("batch_size", "limit"))

    @property
    def parsed_budgets(self) -> list[str]:
        """Returns the budgets, each once."""
        texts = self.budgets.split(";") if isinstance(self.budgets, str) else self.budgets
        return [str(budget) for budget in dict.fromkeys(Budget.parse(text) for text in texts if text.strip())]

    @property
    def output_folder(self) -> Path:
        """Returns the folder of the results."""
        return Path(self.out) if self.out is not None else self.results_folder(RESULTS)


def run(settings: Settings) -> int:
    """Evaluates at each budget, shows one table, and writes everything."""
    from mllm.commands.terminal import console, plain_table, quiet_loading

    try:
        import lmms_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"mllm lmms-eval needs lmms-eval: {install_line('lmms')}") from error
    from mllm.checkpoints.load import load_for
    from mllm.lmms.model import ElasticChat, device_of_rank
    from mllm.lmms.sweep import sweep, table_rows, write

    settings = settings.pinned()
    quiet_loading()
    device = "cpu" if settings.use_cpu else device_of_rank()
    chat = ElasticChat(
        pretrained=str(settings.model_folder),
        budget=settings.parsed_budgets,
        batch_size=settings.batch_size,
        device=device,
        loaded=load_for(settings, device=device),
    )
    options: dict[str, Any] = {
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "gen_kwargs": settings.gen_kwargs,
        "batch_size": settings.batch_size,
        "log_samples": settings.log_samples,
        "verbosity": "WARNING",
    }
    evaluated = list(sweep(chat, tasks=settings.tasks, include_path=settings.include_path, **options))
    if not evaluated:  # another process tells
        return 0
    write(evaluated, settings.output_folder)
    titles, *lines = table_rows(evaluated)
    console().print(plain_table(titles, lines, num_names=2))
    console().print(f"written to {settings.output_folder}")
    return 0
