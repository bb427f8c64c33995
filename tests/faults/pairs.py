"""Rows of two processes of one training: one is killed, another stage of ZeRO goes on, one lacks media.

The processes are forked (`children.run_pair`), which spares each try the start of a launcher and two imports.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import tiny
import torch
from children import KILLED, Ended, run_child, run_pair
from ground import Ground, Outcome
from harness import log_rows, make_trainer, run_settings
from safetensors.torch import load_file
from world import STEPS, digests_of_run, problems_of_run

from mllm.config.model import MomeConfig
from mllm.training.checkpoint import OPTIMIZER, TRAINABLES
from mllm.utils.distributed import check_deepspeed, prepare_launch

CONFIGS = Path(__file__).parents[2] / "configs"
ONE, DDP, ZERO2, ZERO3 = "one process", "DDP", "ZeRO-2", "ZeRO-3"
PLACES = ("checkpoint.written@2", "checkpoint.named@1", "step.end@3", "model.moving@2", "collate@4")
PATTERNS = [media for count in range(4) for media in itertools.combinations(("image", "audio", "video"), count)]
"""The eight sets of media that a sample may have."""
PAIRS = list(itertools.product(PATTERNS, repeat=2))


def launched(work: Callable[[str | None], object], stage: str, log: Path, **options: object) -> list[Ended]:
    """Run work, which is given the file of a DeepSpeed config or None, on one process or on two."""
    if stage.startswith("ZeRO"):
        _compile_communication()
    file = str(CONFIGS / f"zero{stage[-1]}.json") if stage.startswith("ZeRO") else None
    if stage == ONE:
        return [run_child(functools.partial(work, file), log, **options)]  # type: ignore[arg-type]
    return run_pair(functools.partial(work, file), log, **options)  # type: ignore[arg-type]


@functools.cache
def _compile_communication() -> None:
    """Let DeepSpeed compile and load its communication once, before the forks: a kill would else leave its lock."""
    check_deepspeed(on_cpu=True)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()


def kills_of_one_of_two(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 of one of two processes, at a place or at any instant: both go on to the end bit for bit as if there had
    been no kill. Every third of the tries has no DeepSpeed, ZeRO-2, ZeRO-3."""
    outcome, references = Outcome(), {}
    for number in range(tries):
        stage, rank = (DDP, ZERO2, ZERO3)[number % 3], number // 3 % 2
        run = ground.fresh("try") / "run"
        if stage not in references:
            references[stage] = _reference(ground, stage)
        expected, seconds = references[stage]
        work = lambda file, run=run: ground.world.train(run, deepspeed=file)  # noqa: E731
        place = PLACES[number // 3 % len(PLACES)]
        if number % 2 and not (rank and place.startswith(("checkpoint", "model"))):  # which the first alone writes
            name, count = place.split("@")
            ended = launched(work, stage, ground.log, fail_point=f"{name}:kill@{count}", rank=rank)
            problems = (
                [] if ended[rank].code == KILLED else [f"ended with {ended[rank].code}: {ended[rank].said[-300:]}"]
            )
        else:
            place = f"after {(after := seconds * rng.uniform(0.3, 1.0)):.1f} s"
            launched(work, stage, ground.log, kill_after=after, rank=rank)
            problems = []
        more = launched(work, stage, ground.log)
        failed = [one.said[-300:] for one in more if one.code]
        outcome.add(problems + (failed or problems_of_run(run, expected)), f"{stage}, process {rank}, {place}")
    return outcome


def _reference(ground: Ground, stage: str) -> tuple[dict[str, str], float]:
    """Digests of an uninterrupted run of two processes, and how long it takes."""
    run = ground.fresh(f"reference-{stage}") / "run"
    ended = launched(lambda file: ground.world.train(run, deepspeed=file), stage, ground.log)
    assert not any(one.code for one in ended), ended[0].said + ended[1].said
    return digests_of_run(run), ended[0].seconds


def changes_of_stage(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """A run of one stage, killed behind its first checkpoint, goes on in another, and ends as one process does."""
    outcome, whole = Outcome(), ground.fresh("whole") / "run"
    changes = [pair for pair in itertools.permutations((ONE, DDP, ZERO2, ZERO3), 2) if "ZeRO" in pair[0] + pair[1]]

    def train(run: Path, stage: str, **options: object) -> list[Ended]:
        values = {"accumulation": 2 if stage == ONE else 1, "learning_rate": 1e-3}
        return launched(lambda file: ground.world.train(run, deepspeed=file, **values), stage, ground.log, **options)

    (reference,) = train(whole, ONE)
    assert reference.code == 0, reference.said
    for number in range(tries):
        before, after = changes[number % len(changes)]
        run = ground.fresh("try") / "run"
        first = train(run, before, fail_point="checkpoint.named:kill@1")
        problems = [] if first[0].code == KILLED else [first[0].said[-300:]]
        failed = [one.said[-300:] for one in train(run, after) if one.code]
        outcome.add(problems + (failed or _differences(whole, run, f"checkpoint-{STEPS:08d}")), f"{before} to {after}")
    return outcome


def _differences(one: Path, two: Path, checkpoint: str) -> list[str]:
    """List the weights and moments of a checkpoint that differ between two runs by more than sums in another order."""
    problems = []
    for file in (TRAINABLES, OPTIMIZER):
        expected, found = load_file(one / checkpoint / file), load_file(two / checkpoint / file)
        if expected.keys() != found.keys():
            return [f"{file}: other names"]
        close = {name: torch.allclose(found[name], value, rtol=1e-4, atol=1e-5) for name, value in expected.items()}
        problems += [f"{file}: {name}" for name, is_close in close.items() if not is_close]
    return problems[:3]


def skewed_media(*stages: str, adapter: MomeConfig | None = None) -> Callable[[Ground, int, random.Random], Outcome]:
    """Make a row of steps in which two processes have two of the eight sets of media, all 64 pairs of them."""

    def run(ground: Ground, tries: int, rng: random.Random) -> Outcome:
        outcome, folder = Outcome(), ground.fresh("skewed")
        pairs = [
            PAIRS[number] for number in sorted(rng.sample(range(len(PAIRS)), min(len(PAIRS), tries // len(stages))))
        ]
        for stage in (ONE, *stages):
            work = functools.partial(_train_skewed, pairs, folder / stage, adapter, 2 if stage == ONE else 1)
            ended = launched(work, stage, ground.log, timeout=300 + 4 * len(pairs))
            problems = [one.said[-300:] for one in ended if one.code]
            if stage == ONE:
                assert not problems, problems
                continue
            problems = problems or _differences(folder / ONE, folder / stage, f"checkpoint-{len(pairs):08d}")
            problems = problems or _other_losses(folder / ONE, folder / stage)
            for pair in pairs:
                outcome.add(problems, f"{stage}: {pair}")
        return outcome

    return run


def _other_losses(one: Path, two: Path) -> list[str]:
    losses = [[row["loss"] for row in log_rows(run) if "loss" in row] for run in (one, two)]
    is_same = len(losses[0]) == len(losses[1]) and all(abs(a / b - 1) < 1e-4 for a, b in zip(*losses, strict=True))
    return [] if is_same else [f"other losses: {losses}"]


def _train_skewed(
    pairs: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    run: Path,
    adapter: MomeConfig | None,
    accumulation: int,
    deepspeed: str | None,
) -> None:
    """Train a step of two rows on each pair, one row for each process, or both for one."""
    prepare_launch(use_cpu=True, deepspeed=deepspeed is not None)
    kinds = list(itertools.chain.from_iterable(pairs))
    model = tiny.settings(("image", "audio", "video"))
    model = dataclasses.replace(model, adapter=adapter or model.adapter)
    values = {"max_steps": len(pairs), "learning_rate": 1e-4, "save_every": len(pairs), "deepspeed": deepspeed}
    settings = run_settings(run, model, accumulation=accumulation, **values)
    trainer = make_trainer(settings, kinds=kinds, rows=len(kinds), batches=[[row] for row in range(len(kinds))])
    trainer.train()
