"""Which torch an environment gets, and that what pip refuses is told from what it cannot find; pip itself is run."""

import hashlib
import zipfile
from pathlib import Path

import install
import pytest


def wheel(folder: Path, name: str, version: str) -> str:
    """A package of one empty module; returns its pin with its hash."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", f"build = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{name}==={version} --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows of, and another one to install into."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    monkeypatch.setattr(install, "FOLDER", tmp_path / "requirements")
    install.FOLDER.mkdir()
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    (install.FOLDER / "torch.txt").write_text(wheel(tmp_path / "shelf", "torch", "2.13.0"))
    return tmp_path / "shelf"


def build_in(shelf: Path) -> str:
    """Which torch was installed."""
    return (shelf.parent / "installed" / "torch.py").read_text().split("'")[1]


def machine(monkeypatch: pytest.MonkeyPatch, *, gpu: bool) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: gpu)
    monkeypatch.setattr(install, "has_cpu_build", lambda: True)


def test_without_a_gpu_the_build_for_the_cpu_is_taken(shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (install.FOLDER / "torch-cpu.txt").write_text(wheel(shelf, "torch", "2.13.0+cpu"))
    machine(monkeypatch, gpu=False)
    install.install_torch("auto")
    assert build_in(shelf) == "2.13.0+cpu"
    assert capsys.readouterr().out == "[install] torch: the CPU's build, about 200 MB (no GPU here)\n"


def test_where_no_index_has_it_the_registrys_is_taken_and_said(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (install.FOLDER / "torch-cpu.txt").write_text(f"torch==2.13.0+cpu --hash=sha256:{'0' * 64}\n")
    machine(monkeypatch, gpu=False)
    install.install_torch("auto")
    assert build_in(shelf) == "2.13.0"
    assert "no index that pip is told of has the CPU's build" in capsys.readouterr().out
    with pytest.raises(install.InstallError, match="No matching distribution found for torch"):
        install.install_torch("cpu")


def test_a_wheel_of_another_hash_is_refused_and_not_replaced(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(shelf, "torch", "2.13.0+cpu")
    (install.FOLDER / "torch-cpu.txt").write_text(f"torch==2.13.0+cpu --hash=sha256:{'0' * 64}\n")
    machine(monkeypatch, gpu=False)
    with pytest.raises(install.InstallError, match="DO NOT MATCH THE HASHES"):
        install.install_torch("auto")
    assert not (shelf.parent / "installed").exists()


def test_with_a_gpu_the_registrys_build_is_taken(shelf: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    (install.FOLDER / "torch-cpu.txt").write_text(wheel(shelf, "torch", "2.13.0+cpu"))
    machine(monkeypatch, gpu=True)
    install.install_torch("auto")
    assert build_in(shelf) == "2.13.0"
    assert "this machine has a GPU" in capfd.readouterr().out


def test_a_gpu_is_seen_by_its_device_or_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install.has_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert install.has_gpu(tmp_path)
    (tmp_path / "nvidia0").unlink()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert install.has_gpu(tmp_path)


def test_what_pip_cannot_do_is_said_and_ends_with_one(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (install.FOLDER / "build.txt").write_text("absent==1 --hash=sha256:" + "0" * 64 + "\n")
    assert install.main(["--no-project"]) == 1
    assert "[install] failed: ERROR: " in capsys.readouterr().out
