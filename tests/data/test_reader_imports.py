"""Readers of speech and of vision stand side by side: what both share lies above them."""

import ast
from pathlib import Path

import mllm.data

DATA = Path(mllm.data.__file__).parent


def imports_of(file: Path) -> set[str]:
    """Return the modules that a file imports names from."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_vision_readers_and_what_is_shared_import_no_speech_and_the_reverse() -> None:
    for file in DATA.rglob("*.py"):
        if file.name == "readers.py":  # knows every reader
            continue
        for other in {"speech", "vision"} - {file.parent.name}:
            strange = [name for name in imports_of(file) if name.startswith(f"mllm.data.{other}")]
            assert not strange, f"{file.relative_to(DATA)} imports {strange}"
