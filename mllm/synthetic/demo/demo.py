"""Runs the main job on the synthetic corpus: make the corpora, train one elastic model, evaluate it at every budget.

Knows the synthetic corpus, training and evaluation, and in which order they come. Does not know how any of them works.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mllm.config.evaluation import EvaluationConfig
from mllm.config.model import check_at_least
from mllm.utils.progress import Progress

RECIPE = Path(__file__).with_name("demo.yaml")
BUDGETS = (
    *("audio=/4,video=/2", "audio=/4,video=/5", "audio=/8,video=/2", "audio=/16,video=/2", "audio=/16,video=/5"),
    *("image=64", "image=16", "image=4", "image=1"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Say how much the demo does; the defaults take about 6 minutes on 2 idle CPU cores."""

    out: str = "runs/demo"
    """Folder for the corpora, the run, the evaluation and the plot."""
    seed: int = 0
    """Random seed of the corpora, the initial values, the sampled budgets and the order of samples."""
    steps: int | None = None
    """Number of optimizer steps, a tenth of them warm-up at most; the recipe's when left out."""
    num_utterances: int = 1500
    """Number of spoken sentences to train on."""
    num_scenes: int = 2500
    """Number of images to train on, with eight questions each."""
    num_test_utterances: int = 150
    """Number of spoken sentences to test on, by voices that were not trained on."""
    num_test_scenes: int = 300
    """Number of images to test on, with a question of every kind."""

    def __post_init__(self) -> None:
        check_at_least(self, [field.name for field in fields(self) if field.name not in ("out", "seed", "steps")])


def demo(settings: DemoConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run the demo; what is there already (corpora, a trained model, answers) is not made again.

    Returns:
        `rows`: the rows of the evaluation. `seconds`: of each part that was run.

    Raises:
        ImportError: the speech synthesiser is not installed; the message has the pip line.
        ValueError: the folder holds a demo of other settings.
    """
    from mllm.evaluation.run import evaluate
    from mllm.training.run import train

    report = progress or (lambda *_: None)
    out = Path(settings.out)
    claim(out, settings)
    seconds = {}
    started = time.monotonic()
    write_corpora(out / "corpus", settings, progress=report)
    seconds["corpora"] = time.monotonic() - started
    if not (out / "trainables.safetensors").exists():
        started = time.monotonic()
        train(run_settings(settings), resume="auto")
        seconds["training"] = time.monotonic() - started
    started = time.monotonic()
    results = evaluate(
        evaluation_settings(settings), progress=lambda done, total: report("answering the test questions", done, total)
    )
    assert results is not None
    seconds["evaluation"] = time.monotonic() - started
    return {"rows": results.rows, "seconds": seconds}


def write_corpora(out: Path, settings: DemoConfig, *, progress: Progress) -> None:
    """Make the speech and the image corpus, each unless it is there whole; its test manifest is written last."""
    seed = settings.seed
    if not (out / "speech" / "test.jsonl").exists():
        write_speech(out / "speech", settings.num_utterances, settings.num_test_utterances, seed, progress)
    if not (out / "images" / "test.jsonl").exists():
        write_images(out / "images", settings.num_scenes, settings.num_test_scenes, seed, progress)


def write_speech(folder: Path, num_train: int, num_test: int, seed: int, progress: Progress) -> None:
    """Make a speech corpus on all cores."""
    from mllm.synthetic.speech.corpus import SpeechCorpusConfig, write_speech_corpus

    write_speech_corpus(
        folder,
        SpeechCorpusConfig(num_train=num_train, num_test=num_test, seed=seed),
        num_workers=os.cpu_count() or 1,
        on_progress=lambda done, total: progress("speaking", done, total),
    )


def write_images(folder: Path, num_train: int, num_test: int, seed: int, progress: Progress) -> None:
    """Make an image corpus."""
    from mllm.synthetic.images.corpus import write_image_corpus

    progress("drawing", 0, 1)
    write_image_corpus(folder, num_train=num_train, num_test=num_test, seed=seed)
    progress("drawing", 1, 1)


def run_settings(settings: DemoConfig) -> Any:
    """Fill the folders, the seed and the steps of this demo into the recipe."""
    from mllm.config.run import read_run_config

    values = yaml.safe_load(RECIPE.read_text())
    out = Path(settings.out)
    data, train = values["data"], values["train"]
    for key in ("train", "captions"):
        data[key] = [str(out / path) for path in data[key]]
    data["noise"] = str(out / data["noise"])
    train["out"] = settings.out
    train["seed"] = settings.seed
    values["model"]["seed"] = settings.seed
    if settings.steps is not None:
        train["max_steps"] = settings.steps
        train["warmup_steps"] = min(train["warmup_steps"], settings.steps // 10)
    return read_run_config(values)


def evaluation_settings(settings: DemoConfig) -> EvaluationConfig:
    """Ask for the test sets at every budget of the demo, with audio in quiet and in babble of other voices at 0 dB."""
    corpus = Path(settings.out) / "corpus"
    return EvaluationConfig(
        model=settings.out,
        name="demo",  # so that a user's first evaluation of this model has a folder left
        manifest=[str(corpus / "speech" / "test.jsonl"), str(corpus / "images" / "test.jsonl")],
        budgets=list(BUDGETS),
        noise=str(corpus / "speech" / "noise" / "test.wav"),
        snr_db=[None, 0.0],
        max_new_tokens=24,
        batch_size=50,
        seed=settings.seed,
        use_cpu=True,
    )


def claim(out: Path, settings: Any, *, ignored: Sequence[str] = ("out",)) -> None:
    """Make a folder that of a demo of these settings, or find that it is.

    Args:
        settings: a dataclass.
        ignored: keys that may differ.

    Raises:
        ValueError: it was made with other settings; they are named.
    """
    config = {key: value for key, value in asdict(settings).items() if key not in ignored}
    mark = out / "demo.json"
    if mark.exists() and (before := json.loads(mark.read_text())) != config:
        changed = ", ".join(f"{key} was {before.get(key)}" for key in config if before.get(key) != config[key])
        raise ValueError(f"{out} holds a demo of other settings ({changed}); choose another --out or remove it")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(config, indent=1) + "\n")
