"""The README is the map: its tree is the tree, its commands parse, its configs exist."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = ("mllm", "configs", "benchmarks", "scripts", "docs")
HIDDEN = {"__pycache__", "assets"}


def files_on_disk() -> set[str]:
    names = set()
    for folder in SHOWN:
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and not HIDDEN & set(parts) and path.stat().st_size > 0:
                names.add("/".join(parts))
    return names


def files_in_readme() -> dict[str, str]:
    """Path to phrase, read from the block under "The tree": two spaces of indent per folder."""
    block = README.split("## The tree")[1].split("```")[1]
    names, stack = {}, []
    for line in filter(None, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition(" ")
        stack = [*stack[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            names["/".join(stack)] = phrase.strip()
    return names


def test_the_tree_in_the_readme_is_the_tree_and_every_file_has_its_phrase() -> None:
    shown = files_in_readme()
    assert set(shown) == files_on_disk()
    assert not [path for path, phrase in shown.items() if not phrase]


def commands() -> list[str]:
    """Every `mllm ...` command of the README, whatever starts it."""
    lines = [line.split("#")[0].strip() for block in README.split("```")[1::2] for line in block.splitlines()]
    names = [line for line in lines if re.match(r"(mllm|accelerate|torchrun|deepspeed) ", line)]
    return [re.sub(r"^.*?(-m|--module) mllm ", "mllm ", line) for line in names]


def test_the_readme_names_commands() -> None:
    assert len(commands()) >= 10


@pytest.fixture(scope="module")
def beside_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configs of the clone and those that the README's own lines write."""
    from mllm.cli import main

    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert [main(shlex.split(line)[1:]) for line in commands() if line.startswith("mllm init")] == [0, 0]
        assert main(["init", "run.yaml", "--built_in"]) == 0  # as docs call the reader's own
    run = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(run.replace("\ndata:\n", "\ndata:\n  features: {folder: features}\n"))
    return folder


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(
    command: str, beside_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.cli import parse

    monkeypatch.chdir(beside_configs)
    words = shlex.split(command)
    assert words[0] == "mllm"
    parse(words[1:])


def commands_of_docs() -> list[str]:
    """Every `mllm ...` command of the docs that is written out."""
    names = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in page.read_text().split("```")[1::2]:
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"^(?:.*(?:-m|--module) )?(mllm .*)$", line.split(" #")[0].strip())
                if command is not None and "..." not in line:
                    names.append(command[1])
    return names


@pytest.mark.parametrize("command", commands_of_docs())
def test_every_command_of_the_docs_parses(command: str, beside_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm.cli import parse

    monkeypatch.chdir(beside_configs)
    parse(shlex.split(command)[1:])


def test_make_targets_and_configs_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.M)) <= targets
    assert all((ROOT / path).exists() for path in re.findall(r"configs/[\w.]+", README))
    assert all((ROOT / path).exists() for path in re.findall(r"`(mllm/[\w/]+\.py)`", README))
