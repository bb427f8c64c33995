"""Reports what is installed, whether it was tested, what is missing or broken, and the line that repairs it.

Knows packages, tools and the processor. Imports nothing heavy itself: packages are tried in a process apart, so that
one which crashes on import is a line of the report and not the end of it.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mllm.utils import probes
from mllm.utils.compile_locks import stale_locks
from mllm.utils.extras import DISTRIBUTION, install_line

Status = Literal["ok", "missing", "broken", "newer", "older"]
OUTSIDE: tuple[Status, ...] = ("newer", "older")
"""The states of what imports, but in a release that was not tested; a warning, since most such releases work."""
PROBE_SECONDS = 120


@dataclass(frozen=True)
class Package:
    """A package this project uses: its distribution, and what it is for."""

    name: str
    module: str = ""
    purpose: str = ""
    """What does not work without it; empty for what everything needs."""
    extra: str = ""
    """The extra of this project that brings it."""
    apart: bool = False
    """Whether other packages must change with it, so that it is installed by its extra and never by itself."""

    @property
    def imported(self) -> str:
        """The name it is imported by."""
        return self.module or self.name

    def repair(self, tested: SpecifierSet | None) -> str:
        """Give the command that installs a tested release, or, where none is known, what the project's own line brings.

        Args:
            tested: the releases this project was tested with.
        """
        if self.extra and (self.apart or tested is None):
            return install_line(self.extra)
        return f"pip install {shlex.quote(f'{self.name}{tested or str()}')}"


REQUIRED = (
    Package("torch"),
    Package("transformers"),
    Package("peft"),
    Package("accelerate"),
    Package("huggingface_hub"),
    Package("safetensors"),
    Package("tokenizers"),
    Package("numpy"),
    Package("scipy"),
    Package("pillow", module="PIL"),
    Package("av"),
    Package("soundfile"),
    Package("jiwer"),
    Package("pyyaml", module="yaml"),
    Package("packaging"),
    Package("rich"),
    Package("tqdm"),
    Package("matplotlib"),
    Package("tensorboard"),
)
OPTIONAL = (
    Package("torchaudio", purpose="audio augmentation; nothing of the main path", extra="audio"),
    Package("torchvision", purpose="encoders whose image processor needs it (DINOv3)", extra="torchvision"),
    Package("decord", purpose="the decord video backend", extra="decord"),
    Package("deepspeed", purpose="ZeRO training", extra="deepspeed"),
    Package("pillow-heif", module="pillow_heif", purpose="HEIC and HEIF images, as phones take them", extra="heif"),
    Package("liger-kernel", module="liger_kernel", purpose="train.loss_kernel liger, on a GPU", extra="liger"),
    Package("pyarrow", purpose="benchmarks and conversations kept as parquet or arrow files", extra="tables"),
    Package("fastapi", purpose="serving a model over HTTP (mllm serve)", extra="serve"),
    Package("gradio", purpose="a page for browsers (mllm page)", extra="page"),
    Package("uvicorn", purpose="serving a model over HTTP", extra="serve"),
    Package("python-multipart", module="python_multipart", purpose="files sent to that server", extra="serve"),
    Package("prometheus-client", module="prometheus_client", purpose="metrics of that server", extra="serve"),
    Package("espeakng-loader", "espeakng_loader", "making the synthetic corpus's speech", extra="demo"),
    # Later ones cap numpy below 2, or come without their models. It wants protobuf 4, and with it tensorboard 2.20.
    Package("mediapipe", purpose="finding faces for mouth crops (mllm prepare lips)", extra="lips", apart=True),
    Package("num2words", purpose="adopting a SmolVLM, whose processor asks for it", extra="hosts"),
    # It holds numpy below 2.4 up to Python 3.12.
    Package("mistral-common", "mistral_common", "adopting a Voxtral, whose prompts it makes", "voxtral", apart=True),
    Package("gguf", purpose="an LLM in a GGUF file", extra="gguf"),
    Package("bitsandbytes", purpose="a frozen LLM in 8 or 4 bits, on a GPU (model.quantization)", extra="quantization"),
    Package("piper-tts", module="piper", purpose="a voice for the demo on real weights", extra="real", apart=True),
)
TOOLS = {
    "ninja": ('pip install "ninja"', "compiling deepspeed's kernels"),
    "g++": ("apt-get install g++", "compiling deepspeed's kernels"),
}
UNKNOWN_RANGES = (
    "which releases were tested is not known, since this folder is run without having been installed: pip install -e ."
)
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
    """Holds everything `mllm doctor` says."""

    machine: dict[str, str]
    findings: list[Finding]
    is_compared: bool = True
    """Whether it is known which releases were tested; not in a clone that is run without having been installed."""

    @property
    def is_healthy(self) -> bool:
        """Whether everything that is required is there and can be imported, in whatever release."""
        return all(finding.status in ("ok", *OUTSIDE) for finding in self.findings if finding.is_required)

    @property
    def untested(self) -> list[Finding]:
        """What can be imported, but in a release that was not tested; what is optional included."""
        return [finding for finding in self.findings if finding.status in OUTSIDE]

    @property
    def summary(self) -> str:
        """The last line: what works, and how much of that is known."""
        if not self.is_healthy:
            return "something required does not work; see above"
        if not self.is_compared:
            return f"everything required can be imported; {UNKNOWN_RANGES}"
        if self.untested:
            names = ", ".join(f"{finding.name} is {finding.status} than tested" for finding in self.untested)
            return f"everything required can be imported, but not all of it was tested: {names}"
        return "everything required works, in tested releases"


def examine(required: Sequence[Package] = REQUIRED, optional: Sequence[Package] = OPTIONAL) -> Report:
    """Look at this machine and this Python; takes some seconds, since every package is really imported."""
    # What is required is tried as mllm uses it, with broken torchaudio and torchvision kept from transformers; the rest
    # by itself.
    failures = try_imports([package.imported for package in required], beside_mllm=True)
    failures |= try_imports([package.imported for package in optional])
    tested = ranges_of()
    findings = [_package_finding(package, failures, tested or {}, is_required=True) for package in required]
    findings += [_package_finding(package, failures, tested or {}, is_required=False) for package in optional]
    findings += [_tool_finding(tool, repair, purpose) for tool, (repair, purpose) in TOOLS.items()]
    findings += [_lock_finding(lock) for lock in stale_locks()]
    return Report({**_machine(), **_devices()}, findings, is_compared=tested is not None)


def ranges_of(distribution: str = DISTRIBUTION) -> dict[str, SpecifierSet] | None:
    """Read which releases of each package this project was tested with, from its own metadata.

    Returns:
        By canonical name: what is always needed as such, and the rest as its extra has it. None where the project is
        not installed, and so has no metadata.
    """
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return None
    ranges: dict[str, SpecifierSet] = {}
    requirements = [Requirement(line) for line in lines]
    for requirement in sorted(requirements, key=lambda requirement: requirement.marker is not None):
        ranges.setdefault(canonicalize_name(requirement.name), requirement.specifier)
    return ranges


def try_imports(modules: Iterable[str], *, beside_mllm: bool = False) -> dict[str, str]:
    """Import modules in a process apart.

    Args:
        beside_mllm: as mllm imports them, with broken torchaudio and torchvision hidden from transformers.

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
    """Ask `mllm.utils.probes` in a new process; return its answers and how that process ended."""
    # -P keeps the file's own folder, whose modules have common names, from being searched.
    start = ["-m", "mllm.utils.probes"] if beside_mllm else ["-P", probes.__file__]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])]))
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
    lines = [line.removeprefix(probes.MARK) for line in output.splitlines() if line.startswith(probes.MARK)]
    return dict(json.loads(line) for line in lines), ending


def _package_finding(
    package: Package, failures: Mapping[str, str], tested: Mapping[str, SpecifierSet], *, is_required: bool
) -> Finding:
    releases = tested.get(canonicalize_name(package.name))

    def finding(status: Status, detail: str) -> Finding:
        is_needed = package.purpose and status in ("missing", "broken")
        suffix = f"; needed for {package.purpose}" if is_needed else ""
        repair = "" if status == "ok" else package.repair(releases)
        return Finding(package.name, status, detail + suffix, is_required, repair)

    try:
        installed = version(package.name)
    except PackageNotFoundError:
        installed = ""
    failure = failures.get(package.imported, "")
    if failure.startswith("ModuleNotFoundError") and f"'{package.imported}'" in failure:
        return finding("missing", "not installed")
    if failure:
        return finding("broken", f"{installed or 'unknown version'}, but {failure}")
    if releases is None or not installed:
        return finding("ok", installed or "unknown version")
    if releases.contains(installed, prereleases=True):
        return finding("ok", f"{installed}, tested")
    status = "older" if is_older(installed, releases) else "newer"
    return finding(status, f"{installed} is {status} than tested ({releases})")


def is_older(release: str, tested: SpecifierSet) -> bool:
    """Say whether a release that is not among the tested ones came before them."""
    lowest = [
        Version(bound.version.removesuffix(".*")) for bound in tested if bound.operator in (">=", "==", ">", "~=")
    ]
    return bool(lowest) and Version(release) < max(lowest)


def _tool_finding(tool: str, repair: str, purpose: str) -> Finding:
    beside_python = Path(sys.executable).parent / tool
    path = shutil.which(tool)
    if path:
        return Finding(tool, "ok", path, is_required=False)
    if beside_python.exists():
        export = f'export PATH="{beside_python.parent}:$PATH"'
        return Finding(tool, "missing", f"{beside_python} is not on PATH; needed for {purpose}", False, export)
    return Finding(tool, "missing", f"not on PATH; needed for {purpose}", False, repair)


def _lock_finding(lock: Path) -> Finding:
    detail = f"{lock} was left by a process that was ended while it compiled, and others wait for it"
    return Finding(f"lock of {lock.parent.name}", "broken", detail, is_required=False, repair=f"rm {lock}")


def _machine() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}, {', '.join(cpu_features()) or 'no known features'}",
    }


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """List the features of `CPU_FEATURES` this processor has, as Linux tells; none where there is no such file."""
    if not cpuinfo.is_file():
        return []
    lines = cpuinfo.read_text(errors="replace").splitlines()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return [feature for feature in CPU_FEATURES if feature in flags]


def _devices() -> dict[str, str]:
    answers, ending = _probe("devices", [])
    return answers or {"accelerator": f"unknown: torch does not start ({ending})"}
