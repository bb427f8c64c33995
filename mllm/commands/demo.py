"""`mllm demo`: the main job on the built-in world, from nothing to a table and a plot."""

from mllm.world.demo import DemoSettings as Settings

__all__ = ["SUMMARY", "Settings", "run"]

SUMMARY = "make a small world, train one elastic model on it, evaluate it at every budget"


def run(settings: Settings) -> int:
    """Run the demo and show what it found; 1 where it did not show what it is there to show."""
    from pathlib import Path

    from mllm.commands.terminal import console, progress_bar
    from mllm.world.demo import demo
    from mllm.world.demo_report import findings, picture_table, speech_table

    with progress_bar() as show:
        found = demo(settings, progress=show)
    out = console()
    out.print(speech_table(found["rows"]))
    out.print(picture_table(found["rows"]))
    shown = findings(found["rows"])
    for finding in shown:
        out.print(f"{'shown' if finding.holds else 'NOT SHOWN'}: {finding.claim}: {finding.numbers}", soft_wrap=True)
    out.print("seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in found["seconds"].items()))
    out.print(f"plot: {Path(settings.out) / 'evaluation' / 'pareto.png'}; model: {settings.out}", soft_wrap=True)
    return 0 if all(finding.holds for finding in shown) else 1
