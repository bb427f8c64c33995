"""Fills the Python that runs this with the locked versions of a file, a torch that fits the machine, and mllm.

    .venv/bin/python scripts/install.py requirements/dev.txt
    .venv/bin/python scripts/install.py --torch cpu requirements/demo.txt

torch comes apart from the rest, since one release of it has several builds. With an NVIDIA GPU it is the registry's
build, which brings gigabytes of CUDA along; without one it is the CPU's, if an index that pip is told of has it, and
else the registry's all the same. What was chosen, and why, is said. Everything is checked against the hashes of the
lock. Needs nothing but the standard library and pip.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
LOCKED = ("install", "--require-hashes", "--no-deps", "--no-build-isolation")
"""Only what the files name, and nothing else to build it with either."""
NOT_FOUND = "No matching distribution found for torch"


class InstallError(Exception):
    """pip failed; says with what."""


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has a GPU of NVIDIA's, as its driver shows it."""
    return shutil.which("nvidia-smi") is not None or (devices / "nvidia0").exists()


def has_cpu_build() -> bool:
    """Whether torch's makers build it for the CPU apart, on this machine: on others the registry's own is that."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def pip(*words: str, show: bool = False) -> None:
    """Run pip in this environment; what it says is shown if asked for, and is otherwise in the error.

    Raises:
        InstallError: it failed.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(
        command, cwd=ROOT, stdout=None if show else subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise InstallError(done.stderr.strip() or f"pip ended with exit status {done.returncode}")


def install_torch(choice: str) -> None:
    """Install the locked torch.

    Args:
        choice: cpu, cuda, or auto, which looks for a GPU and for an index that has the CPU's build.

    Raises:
        InstallError: pip failed, or the CPU's build was asked for and is not to be had.
    """
    cpu = choice == "cpu" or (choice == "auto" and has_cpu_build() and not has_gpu())
    if not cpu:
        reason = "this machine has a GPU" if has_gpu() else f"--torch {choice}" if choice != "auto" else "no other"
        say(f"torch: the registry's build ({reason}); with CUDA it is some gigabytes")
        pip(*LOCKED, "-r", str(FOLDER / "torch.txt"), show=True)
        return
    say("torch: the CPU's build, about 200 MB (no GPU here)")
    try:
        pip(*LOCKED, "-r", str(FOLDER / "torch-cpu.txt"))
    except InstallError as error:
        if choice == "cpu" or NOT_FOUND not in str(error):
            raise
        say(
            "torch: no index that pip is told of has the CPU's build (PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS name "
            "more); taking the registry's build, which brings gigabytes of CUDA along and runs on the CPU all the same"
        )
        pip(*LOCKED, "-r", str(FOLDER / "torch.txt"), show=True)


def install(files: list[Path], *, torch: str, project: bool, check: bool) -> None:
    """Install what builds, torch, the locked versions of the files, and mllm itself from this folder.

    Raises:
        InstallError: pip failed, or what it installed does not go together.
    """
    start = time.monotonic()
    pip(*LOCKED, "-r", str(FOLDER / "build.txt"))
    install_torch(torch)
    for file in files:
        count = sum("==" in line for line in file.read_text().splitlines())
        say(f"{file.name}: {count} packages, which takes some minutes when they must be downloaded")
        pip(*LOCKED, "-r", str(file))
    if project:
        say("mllm: from this folder, editable")
        pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    if check and files:  # torch alone lacks what it needs, which whoever asked for it alone installs
        pip("check")
    say(f"installed in {time.monotonic() - start:.0f} s")


def say(line: str) -> None:
    sys.stdout.write(f"[install] {line}\n")
    sys.stdout.flush()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="requirements files with hashes")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto", help="which build of torch")
    parser.add_argument("--no-project", action="store_true", help="leave mllm itself out")
    parser.add_argument("--no-check", action="store_true", help="let a file leave out what its packages require")
    options = parser.parse_args(words)
    try:
        files = [file.resolve() for file in options.files]
        install(files, torch=options.torch, project=not options.no_project, check=not options.no_check)
    except InstallError as error:
        say(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
