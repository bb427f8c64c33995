"""Nothing tells anybody to install the package that has this project's import name on the public index."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from mllm.utils.extras import DISTRIBUTION, install_line

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What pip would take for somebody else's package: the bare name behind `install`, or with an extra.
OTHER = re.compile(r"(?<![\w.-])mllm\[|\binstall\s+(?:-\S+\s+)*[\"']?mllm(?![\w/.-])")


def tracked() -> list[Path]:
    """Every file of this project that holds text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git work tree")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()[:8000]]


def test_no_line_names_the_other_package() -> None:
    files = [file for file in tracked() if file != Path(__file__)]
    assert len(files) > 300
    names = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in files
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if OTHER.search(line)
    ]
    assert not names


@pytest.mark.parametrize(
    ("line", "is_other"),
    [
        ("pip install mllm", True),
        ("pip install 'mllm[lips]'", True),
        ('uv pip install -U "mllm"', True),
        ("needs mllm[tables]", True),
        ("pip install -e '.[lips]'", False),
        ("elastic-mllm[test]", False),
        ("python -m mllm demo", False),
        ("cd install/mllm", False),
    ],
)
def test_lines_that_name_it_are_told_from_others(line: str, is_other: bool) -> None:
    assert bool(OTHER.search(line)) == is_other


def test_the_distribution_has_a_name_of_its_own_and_installs_the_command() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "elastic-mllm"
    assert PROJECT["scripts"] == {"mllm": "mllm.cli:main"}


def test_every_hint_names_an_extra_there_is() -> None:
    named = {
        extra
        for file in tracked()
        for extra in re.findall(r"install_line\([\"'](\w+)[\"']\)|\.\[(\w+)\]'", file.read_text(errors="replace"))
        for extra in extra
        if extra
    }
    assert {"lips", "lmms", "tables", "deepspeed"} <= named
    assert named <= set(PROJECT["optional-dependencies"])
    assert install_line("lips").startswith("pip install -e '.[lips]'")
