"""`mllm demo`: the main job on the built-in world, from nothing to a table and a plot."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mllm.world.demo import DemoSettings
from mllm.world.full_demo import FullDemoSettings, full_demo
from mllm.world.full_pictures import FullPicturesSettings, full_pictures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mllm.world.demo_report import Finding

__all__ = ["SUMMARY", "Settings", "run"]

OWN = ("full", "about", "judge")
"""Keys of the command itself, not of a demo."""
SUMMARY = "make a small world, train one elastic model on it, evaluate it at every budget"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The demo takes about 6 minutes on 2 idle CPU cores; what is left out has the defaults of what is run."""

    full: bool = False
    """Instead compare elastic models with separately trained ones, three times over; takes less than an hour on 2 CPU
    cores."""
    about: Literal["speech", "pictures"] | None = None
    """Only with full: two elastic speech models, Omni-AVSR-ST and MoME, against eight of one task and rate each (the
    default), or elastic pictures in the style of M3, MQT and Haar against models of one count of tokens each."""
    out: str | None = None
    """Folder of everything; runs/demo, runs/demo_full or runs/demo_full_pictures when left out."""
    seed: int | None = None
    """Of the corpora, the initial values, the draws and the order of samples; 0 when left out."""
    steps: int | None = None
    """Optimizer steps; with full those of a separate model, and three (speech) or four times as many of an
    elastic one."""
    num_utterances: int | None = None
    """Spoken sentences to train on."""
    num_test_utterances: int | None = None
    """Spoken sentences to test on, by voices that were not trained on."""
    num_scenes: int | None = None
    """Pictures to train on, with eight questions each; not with speech alone."""
    num_test_scenes: int | None = None
    """Pictures to test on, with a question of every kind; not with speech alone."""
    num_seeds: int | None = None
    """How often everything is trained; only with full, 3 when left out."""
    num_workers: int | None = None
    """Models trained at a time; only with full, as many as there are cores when left out."""
    judge: bool = True
    """End with 1 where the demo does not show what it is there to show. A run of a few steps cannot: false for that."""

    def chosen(self) -> DemoSettings | FullDemoSettings | FullPicturesSettings:
        """The settings of the demo that is asked for.

        Raises:
            ValueError: a key of the other one.
        """
        if self.about is not None and not self.full:
            raise ValueError(f"about={self.about} goes with full=true only")
        long = FullPicturesSettings if self.about == "pictures" else FullDemoSettings
        kind = long if self.full else DemoSettings
        given = {key: value for key, value in vars(self).items() if key not in OWN and value is not None}
        allowed = [field.name for field in fields(kind)]
        if wrong := [key for key in given if key not in allowed]:
            about = f" about {self.about or 'speech'}" if self.full else ""
            raise ValueError(
                f"{wrong[0]} does not go with full={str(self.full).lower()}{about}; allowed: {', '.join(allowed)}"
            )
        return kind(**given)


def run(settings: Settings) -> int:
    """Run the demo and show what it found; 1 where it is judged and did not show what it is there to show."""
    from mllm.commands.terminal import console

    chosen = settings.chosen()
    shown = _run(chosen, console()) if isinstance(chosen, DemoSettings) else _run_full(chosen, console())
    return 0 if shown or not settings.judge else 1


def _run(settings: DemoSettings, out: "Console") -> bool:
    from mllm.commands.terminal import progress_bar
    from mllm.world.demo import demo
    from mllm.world.demo_report import findings, picture_table, speech_table

    with progress_bar() as show:
        found = demo(settings, progress=show)
    out.print(speech_table(found["rows"]))
    out.print(picture_table(found["rows"]))
    all_shown = _show(findings(found["rows"]), out)
    out.print("seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in found["seconds"].items()))
    out.print(f"plot: {Path(settings.out) / 'evaluation' / 'pareto.png'}; model: {settings.out}", soft_wrap=True)
    return all_shown


def _run_full(settings: FullDemoSettings | FullPicturesSettings, out: "Console") -> bool:
    from mllm.commands.terminal import progress_bar
    from mllm.world import full_report, pictures_report

    folder = Path(settings.out)
    with progress_bar() as show:
        if isinstance(settings, FullPicturesSettings):
            seconds, found = full_pictures(settings, progress=show), pictures_report.compare(settings)
        else:
            seconds, found = full_demo(settings, progress=show), full_report.compare(settings)
    found.write(folder)
    out.print(found.markdown, soft_wrap=True)
    all_shown = _show(found.findings, out)
    out.print(f"seconds: {seconds:.0f}; plot: {folder / 'comparison.png'}", soft_wrap=True)
    return all_shown


def _show(shown: "Sequence[Finding]", out: "Console") -> bool:
    """Write what was shown and what was not; whether everything was."""
    for finding in shown:
        out.print(f"{'shown' if finding.holds else 'NOT SHOWN'}: {finding.claim}: {finding.numbers}", soft_wrap=True)
    return all(finding.holds for finding in shown)
