"""Optional packages that are installed but broken are hidden from transformers, where that is called for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIGHT = """
import sys
before = list(sys.meta_path)
import mllm, mllm.training.feature_cache.worker
assert sys.meta_path == before
assert not [name for name in ("torch", "transformers", "torchaudio") if name in sys.modules]
"""
USED = """
import mllm
mllm.load, mllm.Answerer, mllm.train, mllm.ElasticProcessor
mllm.register()
mllm.register()
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert type(AutoConfig.for_model("elastic")).__name__ == "ElasticConfig"
"""


@pytest.mark.parametrize("code", [LIGHT, USED], ids=["importing does nothing", "names and register"])
def test_broken_packages_break_nothing(tmp_path: Path, code: str) -> None:
    for name in ("torchaudio", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    assert ("torchaudio is installed but broken and is left out" in run.stderr) == (code != LIGHT)
