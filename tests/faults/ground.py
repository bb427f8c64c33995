"""What all rows of the table share: the world they happen in, an uninterrupted run, and how tries are counted."""

import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from children import run_child
from world import World, digests_of_run


@dataclass
class Outcome:
    """Counts tries of one row and what held, and keeps the first few that did not."""

    tries: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why nothing was tried, where it cannot be here."""
    note: str = ""
    """What was measured."""

    def add(self, problems: list[str], what: str) -> None:
        """Count one try; it held where there are no problems."""
        self.tries += 1
        self.held += not problems
        if problems and len(self.failures) < 5:
            self.failures.append(f"{what}: {'; '.join(problems)}")


@dataclass
class Ground:
    """What rows share: a world, an uninterrupted run in it, and a folder for what they try."""

    folder: Path
    world: World = field(init=False)

    def __post_init__(self) -> None:
        # Before any fork: a child that made it would make it anew, with other times of its media.
        self.world = World.make(self.folder / "world")

    @cached_property
    def seconds(self) -> float:
        """How long the uninterrupted run takes; it lies in `run` afterwards."""
        ended = run_child(lambda: self.world.train(self.folder / "run"), self.log)
        assert ended.code == 0, ended.said
        return ended.seconds

    @cached_property
    def run(self) -> Path:
        assert self.seconds
        return self.folder / "run"

    @cached_property
    def expected(self) -> dict[str, str]:
        return digests_of_run(self.run)

    @property
    def log(self) -> Path:
        return self.folder / "child.log"

    def fresh(self, name: str) -> Path:
        """An empty place for one try."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name
