"""What the doctor promises: it names what is broken and how to repair it, and nothing that is broken stops it."""

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm.doctor import OPTIONAL, REQUIRED, Finding, Package, Report, cpu_features, examine, try_imports

Folder = Callable[[dict[str, str]], Path]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Packages made of one file each, found before the installed ones."""

    def write(packages: dict[str, str]) -> Path:
        for name, code in packages.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path

    return write


def test_imports_are_told_apart(stubs: Folder) -> None:
    stubs({"fine": "print('hello')", "bad": "raise OSError('libc10_cuda.so: not found')", "last": "x = 1"})
    assert try_imports(["fine", "bad", "absent_package", "last"]) == {
        "bad": "OSError: libc10_cuda.so: not found",
        "absent_package": "ModuleNotFoundError: No module named 'absent_package'",
    }


def test_a_package_that_ends_the_process_is_named_and_the_others_are_still_tried(stubs: Folder) -> None:
    stubs({"crash": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "leaves": "raise SystemExit(3)"})
    failures = try_imports(["json", "crash", "leaves", "also_absent"])
    assert failures["crash"] == "importing it ended the process (exit status -11)"
    assert failures["leaves"] == "SystemExit: 3"
    assert set(failures) == {"crash", "leaves", "also_absent"}


def test_the_report_names_state_and_pip_line_of_every_package(stubs: Folder) -> None:
    stubs({"torchaudio": "raise OSError('libc10_cuda.so: not found')"})
    torchaudio = next(package for package in OPTIONAL if package.name == "torchaudio")
    absent, outdated = Package("absent-thing", ">=2", module="absent_thing"), Package("pyyaml", ">=99", module="yaml")
    report = examine([Package("numpy"), absent, outdated], [torchaudio])
    by_name = {finding.name: finding for finding in report.findings}
    assert (by_name["numpy"].status, by_name["numpy"].repair) == ("ok", "")
    assert (by_name["absent-thing"].status, by_name["absent-thing"].repair) == (
        "missing",
        'pip install "absent-thing>=2"',
    )
    assert by_name["pyyaml"].status == "outdated"
    assert by_name["torchaudio"].status == "broken"
    assert "libc10_cuda.so" in by_name["torchaudio"].detail
    assert by_name["torchaudio"].repair == 'pip install "torchaudio==2.11.*"'
    assert not report.is_healthy
    assert sys.executable in report.machine["python"]
    assert int(report.machine["threads"]) >= 1


def test_what_changes_other_packages_is_installed_by_its_extra() -> None:
    mediapipe = next(package for package in OPTIONAL if package.name == "mediapipe")
    assert mediapipe.pip_line == 'pip install "mllm[lips]"'


def test_something_optional_that_is_missing_is_no_illness() -> None:
    fine, optional = Finding("a", "ok", "1.0", True), Finding("b", "missing", "not installed", False)
    assert Report({}, [fine, optional]).is_healthy
    assert not Report({}, [fine, Finding("c", "broken", "1.0", True)]).is_healthy


def test_the_doctor_knows_the_versions_of_the_package_itself() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [line for name in ("audio", "decord", "deepspeed", "liger", "demo", "lips") for line in extras[name]]
    declared = [*project["dependencies"], *optional]
    known = {package.name + package.specifier for package in (*REQUIRED, *OPTIONAL)}
    assert {line.replace("[signatures]", "") for line in declared} - {"ninja"} == known


def test_cpu_features_are_read_as_linux_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags : fpu avx2 avx512f amx_bf16\nmodel name: x\n")
    assert cpu_features(file) == ["avx2", "avx512f", "amx_bf16"]
    assert cpu_features(tmp_path / "none") == []
