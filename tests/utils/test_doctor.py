"""What the doctor promises: it names what is broken and how to repair it, and nothing that is broken stops it."""

import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mllm.utils import environment
from mllm.utils.environment import (  # fmt: skip
    OPTIONAL,
    REQUIRED,
    Finding,
    Package,
    Report,
    cpu_features,
    examine,
    is_older,
    ranges_of,
    try_imports,
)

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


@pytest.fixture
def tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Metadata of this project as pip writes it, that says which releases were tested."""

    def write(*requirements: str) -> None:
        folder = tmp_path / "metadata" / "elastic_mllm-9.dist-info"
        folder.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", "Name: elastic-mllm", "Version: 9"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(folder.parent))

    return write


def test_the_report_names_state_and_pip_line_of_every_package(stubs: Folder, tested: Callable[..., None]) -> None:
    stubs({"torchaudio": "raise OSError('libc10_cuda.so: not found')"})
    tested("numpy<99,>=1", "absent-thing<3,>=2", 'torchaudio==2.11.0; extra == "audio"')
    torchaudio = next(package for package in OPTIONAL if package.name == "torchaudio")
    report = examine([Package("numpy"), Package("absent-thing", module="absent_thing")], [torchaudio])
    by_name = {finding.name: finding for finding in report.findings}
    assert (by_name["numpy"].status, by_name["numpy"].repair) == ("ok", "")
    assert by_name["numpy"].detail == f"{version('numpy')}, tested"
    assert by_name["absent-thing"].status == "missing"
    assert by_name["absent-thing"].repair == "pip install 'absent-thing<3,>=2'"
    assert by_name["torchaudio"].status == "broken"
    assert "libc10_cuda.so" in by_name["torchaudio"].detail
    assert by_name["torchaudio"].repair == "pip install torchaudio==2.11.0"
    assert not report.is_healthy
    assert report.summary == "something required does not work; see above"
    assert sys.executable in report.machine["python"]
    assert int(report.machine["threads"]) >= 1


def test_releases_outside_the_tested_ones_are_named_and_are_no_failure(tested: Callable[..., None]) -> None:
    tested('pyyaml<2,>=1; extra == "old"', "numpy<1,>=0.5", "pyyaml<100,>=99", "rich", 'tqdm<99,>=1; extra == "bars"')
    report = examine([Package("numpy"), Package("pyyaml", module="yaml"), Package("rich")], [Package("tqdm")])
    states = {finding.name: finding.status for finding in report.findings}
    assert [states[name] for name in ("numpy", "pyyaml", "rich", "tqdm")] == ["newer", "older", "ok", "ok"]
    assert report.is_healthy
    assert [finding.name for finding in report.untested] == ["numpy", "pyyaml"]
    assert report.findings[0].detail == f"{version('numpy')} is newer than tested (<1,>=0.5)"
    assert report.findings[0].repair == "pip install 'numpy<1,>=0.5'"
    assert report.summary == (
        "everything required can be imported, but not all of it was tested: numpy is newer than tested, "
        "pyyaml is older than tested"
    )


def test_without_metadata_nothing_is_called_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranges_of("a-distribution-that-is-not-installed") is None
    monkeypatch.setattr(environment, "ranges_of", lambda: None)
    report = examine([Package("numpy")], [])
    assert report.findings[0].detail == version("numpy")
    assert report.is_healthy
    assert "which releases were tested is not known" in report.summary
    assert report.summary.endswith("pip install -e .")


@pytest.mark.parametrize(
    ("release", "tested", "expected"),
    [
        ("5.18.9", ">=5.19,<5.25", True),
        ("5.25.0", ">=5.19,<5.25", False),
        ("2.12.1", "==2.11.*", False),
        ("2.10.0", "==2.11.*", True),
        ("2.13.0+cpu", ">=2.14,<2.15", True),
        ("7", "<6", False),
    ],
)
def test_older_is_told_from_newer(release: str, tested: str, expected: bool) -> None:
    assert is_older(release, SpecifierSet(tested)) == expected


def test_what_changes_other_packages_is_installed_by_its_extra() -> None:
    mediapipe = next(package for package in OPTIONAL if package.name == "mediapipe")
    assert mediapipe.repair(SpecifierSet("==0.10.14")).startswith("pip install -e '.[lips]'")


def test_something_optional_that_is_missing_is_no_illness() -> None:
    fine, optional = Finding("a", "ok", "1.0", True), Finding("b", "missing", "not installed", False)
    assert Report({}, [fine, optional]).is_healthy
    assert not Report({}, [fine, Finding("c", "broken", "1.0", True)]).is_healthy


def test_the_doctor_knows_every_dependency_of_the_package_itself() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert [name_in(line) for line in project["dependencies"]] == [canonicalize_name(one.name) for one in REQUIRED]
    assert {one.extra for one in OPTIONAL} == set(extras) - {"lmms", "test", "dev"}
    assert all(canonicalize_name(one.name) in map(name_in, extras[one.extra]) for one in OPTIONAL)


def name_in(line: str) -> str:
    return canonicalize_name(Requirement(line).name)


def test_cpu_features_are_read_as_linux_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags : fpu avx2 avx512f amx_bf16\nmodel name: x\n")
    assert cpu_features(file) == ["avx2", "avx512f", "amx_bf16"]
    assert cpu_features(tmp_path / "none") == []
