"""What is installed, what is missing or broken, and the line that repairs it.

Knows packages, tools and the processor. Imports nothing heavy itself: packages are tried in a process apart, so that
one which crashes on import is a line of the report and not the end of it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Status = Literal["ok", "missing", "broken", "outdated"]
PROBE_SECONDS = 120


@dataclass(frozen=True)
class Package:
    """A package this project uses: its distribution, the versions it works with, what it is for."""

    name: str
    specifier: str = ""
    module: str = ""
    purpose: str = ""
    """What does not work without it; empty for what nothing works without."""
    extra: str = ""
    """Extra of this project to install it by, where other packages must change with it."""

    @property
    def pip_line(self) -> str:
        """The command that installs a fitting version."""
        wanted = f"mllm[{self.extra}]" if self.extra else f"{self.name}{self.specifier}"
        return f'pip install "{wanted}"'


REQUIRED = (
    # 2.15 breaks torchaudio 2.11, and with it the import of peft and of every transformers model.
    Package("torch", ">=2.11,<2.15"),
    Package("torchvision"),
    Package("transformers", ">=5.19,<6"),
    Package("peft", ">=0.21,<0.22"),
    Package("accelerate", ">=1.15,<2"),
    Package("safetensors", ">=0.4"),
    Package("tokenizers"),
    Package("numpy"),
    Package("scipy"),
    Package("pillow", module="PIL"),
    Package("av", ">=15"),
    Package("soundfile", ">=0.12"),
    Package("jiwer", ">=4"),
    Package("jsonargparse", ">=4.40"),
    Package("pyyaml", module="yaml"),
    Package("rich"),
    Package("matplotlib"),
    Package("tensorboard"),
)
OPTIONAL = (
    Package("torchaudio", "==2.11.*", purpose="audio augmentation; nothing of the main path"),
    Package("decord", "==0.6.0", purpose="the decord video backend"),
    Package("deepspeed", ">=0.19.8,<0.20", purpose="ZeRO training"),
    Package("liger-kernel", ">=0.8.2,<0.9", module="liger_kernel", purpose="train.loss_kernel liger, on a GPU"),
    Package("espeakng-loader", ">=0.2.4", module="espeakng_loader", purpose="making the built-in world's speech"),
    # Later ones cap numpy below 2, or come without their models. It wants protobuf 4, and with it tensorboard 2.20.
    Package("mediapipe", "==0.10.14", purpose="finding faces for mouth crops (mllm prepare lips)", extra="lips"),
)
TOOLS = {
    "ninja": ('pip install "ninja"', "compiling deepspeed's kernels"),
    "g++": ("apt-get install g++", "compiling deepspeed's kernels"),
}
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    is_required: bool
    repair: str = ""


@dataclass(frozen=True)
class Report:
    """Everything `mllm doctor` says."""

    machine: dict[str, str]
    findings: list[Finding]

    @property
    def is_healthy(self) -> bool:
        """Whether everything that is required is there and works."""
        return all(finding.status == "ok" for finding in self.findings if finding.is_required)


def examine(required: Sequence[Package] = REQUIRED, optional: Sequence[Package] = OPTIONAL) -> Report:
    """Look at this machine and this Python; takes some seconds, since every package is really imported."""
    # What is required is tried as mllm uses it, with a broken torchaudio kept from transformers; the rest by itself.
    failures = try_imports([package.module or package.name for package in required], beside_mllm=True)
    failures |= try_imports([package.module or package.name for package in optional])
    findings = [_package_finding(package, failures, is_required=True) for package in required]
    findings += [_package_finding(package, failures, is_required=False) for package in optional]
    findings += [_tool_finding(tool, repair, purpose) for tool, (repair, purpose) in TOOLS.items()]
    return Report({**_machine(), **_devices()}, findings)


def try_imports(modules: Iterable[str], *, beside_mllm: bool = False) -> dict[str, str]:
    """Import modules in a process apart.

    Args:
        beside_mllm: after mllm itself, whose import hooks are then in place.

    Returns:
        What went wrong, by module; those that import are left out. A module that ends the process is named, and the
        ones after it are tried in a new process.
    """
    waiting = list(modules)
    failures: dict[str, str] = {}
    while waiting:
        answers, ending = _probe("imports", waiting, beside_mllm=beside_mllm)
        failures.update({module: error for module, error in answers.items() if error})
        waiting = waiting[len(answers) :]
        if waiting:
            failures[waiting.pop(0)] = f"importing it ended the process ({ending})"
    return failures


def _probe(what: str, arguments: Sequence[str], *, beside_mllm: bool = False) -> tuple[dict[str, str], str]:
    """Answers of `_PROBES[what]` in a new process, and how that process ended."""
    # -P keeps this file's own folder, whose modules have common names, from being searched.
    start = ["-m", "mllm.doctor"] if beside_mllm else ["-P", __file__]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent.parent)]))
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *start, what, *arguments],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
        output, ending = done.stdout, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ending = (error.stdout or b"").decode(), f"no answer in {PROBE_SECONDS} s"
    lines = [line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK)]
    return dict(json.loads(line) for line in lines), ending


_MARK = "mllm-doctor:"  # packages may print whatever they like on import


def _answer(what: str, *arguments: str) -> None:
    """What the process apart does: one line per answer, at once, since the next import may end it."""
    for name, answer in _PROBES[what](arguments):
        sys.stdout.write(f"{_MARK}{json.dumps([name, answer])}\n")
        sys.stdout.flush()


def _import_each(modules: Sequence[str]) -> Iterable[tuple[str, str]]:
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:  # a package may raise anything, even SystemExit
            yield module, f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            yield module, ""


def _describe_devices(_: Sequence[str]) -> Iterable[tuple[str, str]]:
    import torch

    yield "threads", str(torch.get_num_threads())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif torch.backends.mps.is_available():
        yield "mps", "Apple GPU"
    else:
        yield "accelerator", "none; everything runs on the CPU"


_PROBES = {"imports": _import_each, "devices": _describe_devices}


def _package_finding(package: Package, failures: dict[str, str], *, is_required: bool) -> Finding:
    from packaging.specifiers import SpecifierSet

    def finding(status: Status, detail: str) -> Finding:
        repair = "" if status == "ok" else package.pip_line
        suffix = f"; needed for {package.purpose}" if package.purpose and status != "ok" else ""
        return Finding(package.name, status, detail + suffix, is_required, repair)

    module = package.module or package.name
    try:
        installed = version(package.name)
    except PackageNotFoundError:
        installed = ""
    if failures.get(module, "").startswith("ModuleNotFoundError") and f"'{module}'" in failures[module]:
        return finding("missing", "not installed")
    if module in failures:
        return finding("broken", f"{installed or 'unknown version'}, but {failures[module]}")
    if installed and not SpecifierSet(package.specifier).contains(installed, prereleases=True):
        return finding("outdated", f"{installed} is not {package.specifier}")
    return finding("ok", installed or "unknown version")


def _tool_finding(tool: str, repair: str, purpose: str) -> Finding:
    beside_python = Path(sys.executable).parent / tool
    found = shutil.which(tool)
    if found:
        return Finding(tool, "ok", found, is_required=False)
    if beside_python.exists():
        export = f'export PATH="{beside_python.parent}:$PATH"'
        return Finding(tool, "missing", f"{beside_python} is not on PATH; needed for {purpose}", False, export)
    return Finding(tool, "missing", f"not on PATH; needed for {purpose}", False, repair)


def _machine() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}, {', '.join(cpu_features()) or 'no known features'}",
    }


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The features of `CPU_FEATURES` this processor has, as Linux tells; nothing where there is no such file."""
    if not cpuinfo.is_file():
        return []
    lines = cpuinfo.read_text(errors="replace").splitlines()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return [feature for feature in CPU_FEATURES if feature in flags]


def _devices() -> dict[str, str]:
    answers, ending = _probe("devices", [])
    return answers or {"accelerator": f"unknown: torch does not start ({ending})"}


if __name__ == "__main__":
    _answer(*sys.argv[1:])
