"""`mllm demo` runs the main job on the synthetic corpus or on real weights, from nothing to a table and a plot."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mllm.real.demo import RealDemoConfig
from mllm.synthetic.demo.demo import DemoConfig
from mllm.synthetic.demo.full_images import FullImagesConfig, full_images
from mllm.synthetic.demo.full_speech import FullDemoConfig, full_demo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mllm.synthetic.demo.report import Finding

__all__ = ["SUMMARY", "Settings", "run"]

COMMAND_KEYS = ("full", "real", "about", "judge")
"""Keys of the command itself, not of a demo."""
SUMMARY = "Make a small synthetic corpus, train one elastic model on it and evaluate it at every budget."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Run the demo, about 6 minutes on 2 idle CPU cores; what is left out has the defaults of what is run."""

    full: bool = False
    """Compare elastic models with separately trained ones instead, three times over; takes less than an hour on 2 CPU
    cores."""
    real: bool = False
    """Let a frozen Whisper base and a frozen SmolLM2 learn to listen instead, and test them on real recordings. It
    takes 41 minutes on 2 CPU cores, and needs the extra `real`."""
    about: Literal["speech", "images"] | None = None
    """What a full demo compares: two elastic speech models, Omni-AVSR-ST and MoME, with eight of one task and rate each
    (the default), or elastic images in the style of M3, MQT and Haar with models of one count of tokens each. Only with
    full."""
    out: str | None = None
    """Folder of everything; runs/demo, runs/demo_full, runs/demo_full_images or runs/demo_real when left out."""
    seed: int | None = None
    """Random seed of the corpora, the initial values, the sampled budgets and the order of samples; 0 when left out."""
    steps: int | None = None
    """Number of optimizer steps; with full those of a separate model, and three (speech) or four times as many of an
    elastic one."""
    word_steps: int | None = None
    """Number of steps in which the projector learns to hear words; only with real."""
    num_utterances: int | None = None
    """Number of spoken sentences to train on."""
    num_test_utterances: int | None = None
    """Number of spoken sentences to test on, by voices that were not trained on."""
    num_scenes: int | None = None
    """Number of images to train on, with eight questions each; not with speech alone."""
    num_test_scenes: int | None = None
    """Number of images to test on, with a question of every kind; not with speech alone."""
    num_clips: int | None = None
    """Number of synthesised clips to train on; only with real."""
    num_heldout_clips: int | None = None
    """Number of synthesised clips to test on, beside the recordings; only with real."""
    num_recordings: int | None = None
    """Number of recordings to test on; only with real, all when left out."""
    num_seeds: int | None = None
    """Number of seeds that everything is trained with; only with full, 3 when left out."""
    num_workers: int | None = None
    """Number of models trained at a time; only with full, as many as there are cores when left out."""
    judge: bool = True
    """End with 1 where the demo does not show what it is there to show. A run of a few steps cannot: false for that."""

    def chosen(self) -> DemoConfig | FullDemoConfig | FullImagesConfig | RealDemoConfig:
        """Give the settings of the demo that is asked for.

        Raises:
            ValueError: a key of another one.
        """
        if self.about is not None and not self.full:
            raise ValueError(f"about={self.about} goes with full=true only")
        if self.real and self.full:
            raise ValueError("real=true does not go with full=true; they are two demos")
        long = FullImagesConfig if self.about == "images" else FullDemoConfig
        kind = RealDemoConfig if self.real else long if self.full else DemoConfig
        values = {key: value for key, value in vars(self).items() if key not in COMMAND_KEYS and value is not None}
        allowed = [field.name for field in fields(kind)]
        if wrong := [key for key in values if key not in allowed]:
            about = f" about {self.about or 'speech'}" if self.full else ""
            mode = "real=true" if self.real else f"full={str(self.full).lower()}{about}"
            raise ValueError(f"{wrong[0]} does not go with {mode}; allowed: {', '.join(allowed)}")
        return kind(**values)


def run(settings: Settings) -> int:
    """Run the demo and show what it found; 1 where it is judged and did not show what it is there to show."""
    from mllm.commands.terminal import console

    chosen = settings.chosen()
    if isinstance(chosen, RealDemoConfig):
        shown = _run_real(chosen, console())
    else:
        shown = _run(chosen, console()) if isinstance(chosen, DemoConfig) else _run_full(chosen, console())
    return 0 if shown or not settings.judge else 1


def _run(settings: DemoConfig, out: "Console") -> bool:
    from mllm.commands.terminal import progress_bar
    from mllm.evaluation.plot import PLOT
    from mllm.synthetic.demo.demo import demo, evaluation_settings
    from mllm.synthetic.demo.report import findings, image_table, speech_table

    with progress_bar() as show:
        results = demo(settings, progress=show)
    out.print(speech_table(results["rows"]))
    out.print(image_table(results["rows"]))
    all_shown = _show(findings(results["rows"]), out)
    out.print("seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in results["seconds"].items()))
    out.print(f"plot: {evaluation_settings(settings).output_folder / PLOT}; model: {settings.out}", soft_wrap=True)
    return all_shown


def _run_real(settings: RealDemoConfig, out: "Console") -> bool:
    from mllm.commands.terminal import progress_bar
    from mllm.real.demo import real_demo
    from mllm.real.report import PLOT, REPORT

    with progress_bar() as show:
        report, seconds = real_demo(settings, progress=show)
    report.write(Path(settings.out))
    for text in (report.table, report.transcripts):
        out.print(text, soft_wrap=True)
    shown = _show(report.findings, out)
    out.print("seconds: " + ", ".join(f"{part} {taken:.0f}" for part, taken in seconds.items()))
    folder = Path(settings.out)
    out.print(f"report: {folder / REPORT}; plot: {folder / PLOT}; model: {settings.out}", soft_wrap=True)
    return shown


def _run_full(settings: FullDemoConfig | FullImagesConfig, out: "Console") -> bool:
    from mllm.commands.terminal import progress_bar
    from mllm.synthetic.demo import full_images_report, full_speech_report

    folder = Path(settings.out)
    with progress_bar() as show:
        if isinstance(settings, FullImagesConfig):
            seconds, comparison = full_images(settings, progress=show), full_images_report.compare(settings)
        else:
            seconds, comparison = full_demo(settings, progress=show), full_speech_report.compare(settings)
    comparison.write(folder)
    out.print(comparison.markdown, soft_wrap=True)
    all_shown = _show(comparison.findings, out)
    out.print(f"seconds: {seconds:.0f}; plot: {folder / 'comparison.png'}", soft_wrap=True)
    return all_shown


def _show(shown: "Sequence[Finding]", out: "Console") -> bool:
    """Write what was shown and what was not; return whether everything was."""
    for finding in shown:
        out.print(f"{'shown' if finding.holds else 'NOT SHOWN'}: {finding.claim}: {finding.numbers}", soft_wrap=True)
    return all(finding.holds for finding in shown)
