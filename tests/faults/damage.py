"""Rows of files that are damaged or not meant well: found by name, or refused by one error, and nothing runs."""

import contextlib
import random
import shutil
from pathlib import Path

from children import mutate, run_child
from ground import Ground, Outcome
from pickles import hostile_files

from mllm.checkpoints.export import export
from mllm.convert.state_files import find_state, read_all
from mllm.media import MediaError, load_audio, load_image, load_video
from mllm.training.run_folder import list_checkpoints, read_checkpoint
from mllm.utils.sealing import MANIFEST, check_before_load, read_manifest


def damaged_files(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """One damaged file of a checkpoint, a run or an export: refused by its name before anything of it is used."""
    exported = ground.fresh("exports") / "export"
    export(ground.run, exported)
    checkpoint = list_checkpoints(ground.run)[-1]
    homes = [(checkpoint, read_checkpoint), (ground.run, check_before_load), (exported, check_before_load)]
    outcome = Outcome()
    for number in range(tries):
        home, check = homes[number % 3]
        manifest = read_manifest(home)
        names = [*manifest["files"], MANIFEST]
        path = home / names[rng.randrange(len(names))]
        whole = path.read_bytes()
        path.write_bytes(damaged := mutate(whole, rng))
        try:
            check(home)
            # Blanks of JSON, or a piece that was put in place of an equal one: the same content.
            is_same = damaged == whole or (path.name == MANIFEST and read_manifest(home) == manifest)
            problems = [] if is_same else ["accepted"]
        except ValueError as error:
            problems = [] if path.name in str(error) else [str(error)]
        finally:
            path.write_bytes(whole)
        outcome.add(problems, f"{path.name} of {home.name}")
    return outcome


def damaged_media(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Media of nine kinds that are cut, overwritten, zeroed or repeated: a result or one MediaError, never a death."""
    import numpy as np
    from test_media_damage import damaged, whole_file

    folder, outcome, per_child = ground.fresh("media"), Outcome(), 100
    done = folder / "done"  # a byte for each try; what a dying child says is in its log
    suffixes = ("jpg", "png", "webp", "bmp", "wav", "flac", "mp3", "ogg", "mp4")
    whole = {}
    for suffix in suffixes:
        write = lambda name, count, codec: _write_video(folder / name)  # noqa: E731
        whole[suffix] = whole_file(f"a.{suffix}", folder, write).read_bytes()

    def work(seed: int, count: int) -> None:
        generator = np.random.default_rng(seed)
        for index in range(count):
            suffix = suffixes[(seed + index) % len(suffixes)]
            load = load_video if suffix == "mp4" else load_audio if suffix in suffixes[4:8] else load_image
            path = folder / f"try.{suffix}"
            path.write_bytes(damaged(whole[suffix], generator))
            with contextlib.suppress(MediaError):
                load(path)
            with done.open("ab") as file:
                file.write(b".")

    for start in range(0, tries, per_child):
        count = min(per_child, tries - start)
        seed = rng.randrange(10**6)
        done.write_bytes(b"")
        ended = run_child(lambda s=seed, c=count: work(s, c), ground.log, timeout=300)
        outcome.tries, outcome.held = outcome.tries + count, outcome.held + done.stat().st_size
        if ended.code:
            outcome.failures.append(f"seed {seed}: {ended.code} {ended.said[-300:]}")
    return outcome


def _write_video(path: Path) -> Path:
    import tiny

    name = tiny.write_media(path.parent / "made", seconds=0.4)["video"]
    shutil.copy(path.parent / "made" / name, path)
    return path


def hostile_checkpoints(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Files of torch.save that run code, ask for gigabytes or are damaged: nothing runs, nothing but ValueError."""
    folder, outcome = ground.fresh("pickles"), Outcome()
    canary = folder / "canary"
    for name, content in hostile_files(tries, canary, folder, rng):
        path = folder / f"x{Path(name).suffix}"
        path.write_bytes(content)
        problems = []
        try:
            read_all(find_state(path))
        except ValueError:
            pass
        except BaseException as error:
            problems.append(f"{type(error).__name__}: {error}")
        outcome.add(problems + (["code ran"] if canary.exists() else []), name)
    return outcome
