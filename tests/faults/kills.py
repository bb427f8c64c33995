"""Rows of kills -9, of one process, and of signals that a run may heed: what it had done is there, and it goes on."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

from answer_lines import assert_same_answers
from children import KILLED, run_child
from ground import Ground, Outcome
from test_readers import PRETRAIN, clip
from world import digests_of_run, problems_of_run

from mllm.checkpoints.load import TRAINABLES
from mllm.commands import data_import
from mllm.lip_crops import run as lip_crops
from mllm.lip_crops.config import LipCropsConfig
from mllm.training.feature_cache.check import check_features
from mllm.training.run_folder import newest_checkpoint
from mllm.utils.files import digest_of_file
from mllm.utils.sealing import read_manifest

SAVING = ["checkpoint.written", "checkpoint.sealed", "checkpoint.named", "checkpoint.deleting"]
TRAINING = [*SAVING, "model.written", "model.moving", "step.begin", "step.end", "decode", "collate"]
LAST_SAVE = [
    "checkpoint.written@3",
    "checkpoint.sealed@3",
    "checkpoint.named@3",
    "checkpoint.deleting@1",
    "model.written@2",
]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def kills_in_training_at_named_places(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 at a fail point, then go on to the end: bitwise the weights and moments of the uninterrupted run."""
    outcome = Outcome()
    for number in range(tries):
        point, run = TRAINING[number % len(TRAINING)], ground.fresh("try") / "run"
        # The first time there may be nothing to lose yet; every place is passed at least twice in six steps.
        count = 1 if point == "checkpoint.deleting" else 1 + number // len(TRAINING) % 2
        ended = run_child(lambda run=run: ground.world.train(run), ground.log, fail_point=f"{point}:kill@{count}")
        problems = [] if ended.code == KILLED else [f"ended with {ended.code}: {ended.said[-300:]}"]
        outcome.add(problems + resumed(ground, run), f"{point}@{count}")
    return outcome


def kills_in_the_last_save(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """The same behind the last step, at every file of the model that takes its name: the model is there, whole, after.

    Until then a model is the one of before or none, and `resume` makes it from the last checkpoint.
    """
    outcome, sealed = Outcome(), read_manifest(ground.run)["files"]
    # The files of the processor, all but two, take their names before the first step; the manifest is the last of all.
    passed = len(sealed) - len({"config.json", TRAINABLES} & set(sealed))
    places = [*LAST_SAVE, *(f"model.moving@{passed + number}" for number in range(1, len(sealed) + 2))]
    for number in range(tries):
        place, run = places[number % len(places)], ground.fresh("try") / "run"
        name, count = place.split("@")
        ended = run_child(lambda run=run: ground.world.train(run), ground.log, fail_point=f"{name}:kill@{count}")
        problems = [] if ended.code == KILLED else [f"ended with {ended.code}: {ended.said[-300:]}"]
        outcome.add(problems + resumed(ground, run), place)
    return outcome


def kills_in_training_at_random(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """The same at any instant of the run, every third time twice; with and without processes that read data."""
    outcome = Outcome()
    for number in range(tries):
        run = ground.fresh("try") / "run"
        for _ in range(1 + (number % 3 == 2)):
            _killed(ground, lambda run=run, n=number: ground.world.train(run, workers=n % 2), rng)
        outcome.add(resumed(ground, run, workers=number % 2), f"try {number}")
    return outcome


def _killed(ground: Ground, work: Callable[[], object], rng: random.Random) -> None:
    after = ground.seconds * rng.uniform(0.2, 1.0)
    run_child(work, ground.log, signal_after=(after, signal.SIGKILL))


def resumed(ground: Ground, run: Path, *, workers: int = 0) -> list[str]:
    ended = run_child(lambda: ground.world.train(run, workers=workers), ground.log)
    if ended.code:
        return [f"did not go on: {ended.said[-300:]}"]
    return problems_of_run(run, ground.expected)


def signals_in_training(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """A signal at any instant behind the first step: that step or the next is saved, and the run goes on bitwise."""
    outcome = Outcome()
    for number in range(tries):
        run, sent = ground.fresh("try") / "run", SIGNALS[number % len(SIGNALS)]

        def work(run: Path = run) -> int:
            from mllm.training.interruption import RunInterrupted

            try:
                ground.world.train(run, workers=2, save_every=None)
            except RunInterrupted as interrupted:
                return interrupted.exit_status
            return 0

        after = ground.seconds * rng.uniform(0.3, 1.1)
        ended = run_child(work, ground.log, signal_after=(after, sent))
        problems = []
        if ended.code == 128 + sent:
            steps = _logged_steps(run)
            newest = newest_checkpoint(run)
            if steps and (newest is None or newest.step < steps):
                problems.append(f"step {steps} is in the log, saved is {newest and newest.step}")
        elif ended.code:  # 0: it came when all was done
            problems.append(f"{sent.name} ended it with {ended.code}: {ended.said[-300:]}")
        more = run_child(lambda run=run: ground.world.train(run, save_every=None), ground.log)
        if more.code or digests_of_run(run) != ground.expected:
            problems.append(f"did not go on: {more.code} {more.said[-300:]}")
        outcome.add(problems, f"{sent.name} after {after:.1f} s")
    return outcome


def _logged_steps(run: Path) -> int:
    log = run / "log.jsonl"
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def kills_in_evaluation(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 at a place or at any instant, then go on: the same answers, each once, in the same order."""
    whole = ground.fresh("evaluated") / "out"
    model, outcome = ground.run, Outcome()
    reference = run_child(lambda: ground.world.evaluate(model, whole), ground.log)
    assert reference.code == 0, reference.said
    for number in range(tries):
        out = ground.fresh("try") / "out"
        work = lambda out=out: ground.world.evaluate(model, out)  # noqa: E731
        problems = []
        if number % 2:
            point = ["evaluate.answered", "evaluate.kept"][number // 2 % 2]
            ended = run_child(work, ground.log, fail_point=f"{point}:kill@{1 + number // 4 % 4}")
            problems += [] if ended.code == KILLED else [f"ended with {ended.code}: {ended.said[-300:]}"]
        else:
            after = reference.seconds * rng.uniform(0.2, 1.0)
            run_child(work, ground.log, signal_after=(after, signal.SIGKILL))
        ended = run_child(work, ground.log)
        problems += [ended.said[-300:]] if ended.code else _other_answers(whole, out)
        outcome.add(problems, f"try {number}")
    return outcome


def _other_answers(whole: Path, out: Path) -> list[str]:
    try:
        assert_same_answers(whole / "hypotheses.jsonl", out / "hypotheses.jsonl")
    except AssertionError as error:
        return [f"other answers: {error}"]
    return []


def kills_in_feature_building(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 at a place or at any instant, then go on: every feature is there, every byte is what was written."""
    whole = ground.fresh("features")
    reference = run_child(lambda: ground.world.make_features(whole), ground.log)
    assert reference.code == 0, reference.said
    outcome = Outcome()
    for number in range(tries):
        folder = ground.fresh("try")
        work = lambda folder=folder: ground.world.make_features(folder)  # noqa: E731
        problems = []
        if number % 2:
            point = ["features.shard", "features.index"][number // 2 % 2]
            ended = run_child(work, ground.log, fail_point=f"{point}:kill")
            problems += [] if ended.code == KILLED else [f"ended with {ended.code}: {ended.said[-300:]}"]
        else:
            after = reference.seconds * rng.uniform(0.2, 1.0)
            run_child(work, ground.log, signal_after=(after, signal.SIGKILL))
        ended = run_child(work, ground.log)
        problems += [ended.said[-300:]] if ended.code else []
        config = ground.world.config(folder / "run", features=folder / "features")
        problems = problems or check_features(folder / "features", config).problems
        outcome.add(problems, f"try {number}")
    return outcome


def kills_in_import(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 of `mllm data import`, which cuts clips and lists them: the list is the old one or the new one, and
    whatever it lists is whole."""
    source = ground.fresh("clips")
    for number in range(6):
        clip(source / f"pretrain/s/{number}.mp4", num_frames=50)
        (source / f"pretrain/s/{number}.txt").write_text(PRETRAIN)
    (source / "pretrain.txt").write_text("".join(f"s/{number}\n" for number in range(6)))
    manifest = source / "manifest.jsonl"
    values = {"source": str(source / "pretrain.txt"), "out": str(manifest), "root": str(source), "segments": "cut"}

    def work() -> None:
        data_import.run(data_import.Settings(format="lrs", max_seconds=1.0, **values))

    reference = run_child(work, ground.log)
    assert reference.code == 0, reference.said
    expected, outcome = _files_of(source), Outcome()
    for number in range(tries):
        is_again = bool(number % 2)  # over what an earlier import has made
        for path in [] if is_again else [manifest, *(source / "cut").rglob("*.*")]:
            path.unlink()
        run_child(work, ground.log, signal_after=(reference.seconds * rng.uniform(0.1, 1.0), signal.SIGKILL))
        now = _files_of(source)
        problems = [f"other bytes: {name}" for name, digest in now.items() if expected.get(name, digest) != digest]
        problems += [f"gone: {name}" for name in expected if is_again and name not in now]
        ended = run_child(work, ground.log)
        problems += [] if ended.code == 0 and _files_of(source) == expected else [f"not as before: {ended.said[-300:]}"]
        outcome.add(problems, f"try {number}")
    return outcome


def kills_in_preparing(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 of `mllm prepare lips` at a place or at any instant, then go on: the crops of an uninterrupted run, and
    what was done before is not done again."""
    from talking_face import Film, write_film

    raw, whole = ground.fresh("raw"), ground.folder / "crops"
    for number in range(4):
        write_film(raw / f"{number}.mp4", Film(seconds=0.6 + 0.04 * number))
    work = lambda out: lip_crops.prepare(LipCropsConfig(source=str(raw), out=str(out)))  # noqa: E731
    reference = run_child(lambda: work(whole), ground.log)
    assert reference.code == 0, reference.said
    outcome = Outcome()
    for number in range(tries):
        out = ground.fresh("try") / "out"
        place = {"fail_point": f"prepare.clip:kill@{1 + number // 2 % 4}"}
        instant = {"signal_after": (reference.seconds * rng.uniform(0.2, 1.0), signal.SIGKILL)}
        ended = run_child(lambda out=out: work(out), ground.log, **(place if number % 2 else instant))  # type: ignore[arg-type]
        done = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4") if _is_reported(out, path.stem)}
        problems = [] if ended.code == KILLED or not number % 2 else [f"ended with {ended.code}: {ended.said[-300:]}"]
        ended = run_child(lambda out=out: work(out), ground.log)
        problems += [ended.said[-300:]] if ended.code else []
        problems += [f"done again: {path.name}" for path, made in done.items() if path.stat().st_mtime_ns != made]
        files = [_files_of(folder, but=("prepare.log", "prepare.jsonl")) for folder in (whole, out)]
        problems += [
            f"other: {name}" for name in files[0].keys() | files[1] if files[0].get(name) != files[1].get(name)
        ]
        outcome.add(problems, f"try {number}")
    return outcome


def _is_reported(out: Path, name: str) -> bool:
    report = out / "prepare.jsonl"
    return report.exists() and any(f'"id": "{name}"' in line for line in report.read_text().splitlines(keepends=True))


def _files_of(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Digests of all files below a folder that have their name already."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "." and path.name not in but]
    return {str(path.relative_to(folder)): digest_of_file(path) for path in files}
