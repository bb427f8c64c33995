"""The README is short and true: its map is the tree of packages, its commands parse, what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAX_README_LINES = 200
MAX_PAGES = 16  # one of which a command writes


def packages_on_disk() -> set[str]:
    return {path.parent.name for path in (ROOT / "mllm").glob("*/__init__.py")}


def packages_in_readme() -> dict[str, str]:
    """Package to phrase, read from the table under "Map"; several packages may share a row."""
    rows = re.findall(r"^\| (`mllm/\S+/`(?: `mllm/\S+/`)*) \| (.+) \|$", README.split("## Map")[1], re.M)
    return {name: phrase for cell, phrase in rows for name in re.findall(r"mllm/(\w+)/", cell)}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_the_map_of_the_readme_has_a_phrase_for_every_package() -> None:
    shown = packages_in_readme()
    assert set(shown) == packages_on_disk()
    assert all(len(phrase.split()) >= 3 for phrase in shown.values())


def test_the_readme_leads_to_every_page() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"\(docs/(\w+\.md)", README))
    assert len(pages) <= MAX_PAGES


def test_make_targets_configs_and_modules_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", README, re.M)[0]) - {""} <= targets
    systems = README.split("## The systems it holds")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+\.yaml)`", systems))
    recipes = {path.name for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("accelerate")}
    assert named == recipes
    assert all((ROOT / path).exists() for path in re.findall(r"`(mllm/[\w/]+)`", README))


def commands() -> list[str]:
    """Every `mllm ...` command of the README, whatever starts it."""
    lines = [line.split("#")[0].strip() for block in README.split("```")[1::2] for line in block.splitlines()]
    shown = [line for line in lines if re.match(r"(mllm|accelerate|torchrun|deepspeed) ", line)]
    return [re.sub(r"^.*?(-m|--module) mllm ", "mllm ", line) for line in shown]


def commands_of_docs() -> list[str]:
    """Every `mllm ...` command that the pages and CONTRIBUTING write out; what extends mllm is run by another test."""
    names = []
    for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]:
        if page.name == "extending.md":
            continue
        for block in page.read_text().split("```")[1::2]:
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"^(?:.*(?:-m|--module) )?(mllm .*)$", line.split(" #")[0].strip())
                if command is not None and "..." not in line:
                    names.append(command[1])
    return names


@pytest.fixture(scope="module")
def beside_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configs of the clone and those that the README's own lines write."""
    from mllm.checkpoints.adoption import Findings, proposed_counts
    from mllm.cli import main
    from mllm.commands.adopt import Settings, config_text

    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert [main(shlex.split(line)[1:]) for line in commands() if line.startswith("mllm init")] == [0, 0]
        assert main(["init", "run.yaml", "--built_in"]) == 0  # as docs call the reader's own
    llava = Findings("llava", "image", ("", 0), ("", 0), ("", 0), (24, 24), None, proposed_counts((24, 24)))
    adopted = config_text(Settings(model="llava-hf/llava-1.5-7b-hf", out="adopted.yaml"), llava)
    (folder / "adopted.yaml").write_text(adopted)
    run = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(run.replace("\ndata:\n", "\ndata:\n  features: {folder: features}\n"))
    return folder


def test_the_readme_and_the_pages_write_out_commands() -> None:
    assert len(commands()) >= 10
    assert len(commands_of_docs()) >= 30


@pytest.mark.parametrize("command", dict.fromkeys([*commands(), *commands_of_docs()]))
def test_every_command_that_is_written_out_parses(
    command: str, beside_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.cli import parse

    monkeypatch.chdir(beside_configs)
    words = shlex.split(command)
    assert words[0] == "mllm"
    parse(words[1:])
