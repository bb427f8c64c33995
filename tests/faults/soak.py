"""The row of a long run of which one sample in a hundred cannot be read: its memory stays what it was."""

import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
from children import run_child
from ground import Ground, Outcome

from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.training.run import train

NUM_SAMPLES = 400
NUM_BAD = NUM_SAMPLES // 100
STEPS_PER_LINE = 20
MAX_MIB_PER_THOUSAND_STEPS = 2.0
SECONDS_BETWEEN_LOOKS = 0.5


def long_runs(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Train so many steps, each of which is a try; a slope of memory that is too steep fails all, and so does a bad
    sample that is not listed, or a good one that is."""
    run, manifest, bad = ground.fresh("soak") / "run", ground.folder / "soak" / "train.jsonl", _write_data(ground, rng)
    config = ground.world.config(run, max_steps=tries, save_every=max(1, tries // 10), log_every=STEPS_PER_LINE)
    data = dataclasses.replace(config.data, train=[str(manifest)], max_bad_fraction=0.02)
    config = dataclasses.replace(config, data=data)
    looks: list[tuple[int, float]] = []  # steps, MiB
    last = 0.0

    def observe(child: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LOOKS:
            last = time.monotonic()
            looks.extend((_steps(run), mib) for mib in _resident_mib(child))

    ended = run_child(lambda: train(config), ground.log, timeout=3600, observe=observe)
    problems = [ended.said[-300:]] if ended.code else []
    warm = [look for look in looks if look[0] > tries / 5]
    slope = 1000 * np.polyfit(*zip(*warm, strict=True), 1)[0] if len(warm) > 10 else float("nan")
    if not slope < MAX_MIB_PER_THOUSAND_STEPS:
        problems.append(f"{slope:.2f} MiB in 1,000 steps, of {len(warm)} looks")
    listed = {json.loads(line)["id"] for file in run.glob("skipped-*") for line in file.read_text().splitlines()}
    if listed != bad:
        problems.append(f"listed as bad: {sorted(listed)}, and are: {sorted(bad)}")
    outcome = Outcome(note=f"{slope:.2f} MiB in 1,000 steps")
    for _ in range(tries):
        outcome.add(problems, "the run")
    return outcome


def _write_data(ground: Ground, rng: random.Random) -> set[str]:
    """Write a manifest of the world's clips again and again, of which some are cut, empty, noise or gone; their ids."""
    whole = read_manifest(ground.world.folder / "train.jsonl", ground.world.folder)
    folder = ground.folder / "soak"
    bad = {f"row{number}" for number in rng.sample(range(NUM_SAMPLES), NUM_BAD)}
    samples = []
    for number in range(NUM_SAMPLES):
        sample = whole[number % len(whole)]
        source = Path(ground.world.folder, next(iter(sample.media)).path)
        path = folder / f"{number}.wav"
        content = source.read_bytes()
        if f"row{number}" in bad:
            content = [content[:20], b"", rng.randbytes(len(content)), None][number % 4]
        if content is not None:
            path.write_bytes(content)
        question = (Media("audio", path.name), Text("what?"))
        samples.append(Sample(f"row{number}", (Message("user", question), sample.messages[-1]), "asr"))
    write_manifest(folder / "train.jsonl", samples)
    return bad


def _steps(run: Path) -> int:
    log = run / "log.jsonl"
    return STEPS_PER_LINE * log.read_text().count('"loss"') if log.exists() else 0


def _resident_mib(process: int) -> list[float]:
    """Memory of a process, or none where it has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")]
