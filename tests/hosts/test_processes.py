"""Two processes train a gated host as one does, under DDP and ZeRO, also where one has no row that uses its adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
import yaml
from safetensors.torch import load_file

import mllm
from mllm.checkpoints import adoption
from mllm.checkpoints.load import TRAINABLES

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS: dict[str, list[str]] = {
    "ddp": [],
    "zero2": ["--train.deepspeed", "configs/zero2.json"],
    "zero3": ["--train.deepspeed", "configs/zero3.json"],
}


def write_config(folder: Path, host: str) -> dict[str, Any]:
    """A run over rows with an image and rows without, which never use the adapter; each batch holds one of them."""
    lines = []
    for number in range(8):
        parts = [{"type": "text", "text": "what is this?"}]
        if number % 2 == 0:
            tiny_hosts.image(seed=number).save(folder / f"{number}.png")
            parts.insert(0, {"type": "image", "path": f"{number}.png"})
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"answer {number}"}]
        lines.append(json.dumps({"id": f"s{number}", "task": "vqa", "messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    budgets = list(adoption.examine(host).budgets)
    return {
        "model": {
            "host": host,
            "image": {"budgets": budgets},
            "adapter": {"kind": "gated_lora", "rank": 4, "alpha": 8},
        },
        "data": {"train": [str(folder / "train.jsonl")], "num_workers": 0, "max_rows": 1},
        "sampler": {"mode": "sandwich", "distill_weight": 0.5},
        "train": {
            **{"max_steps": 3, "learning_rate": 0.01, "progress": False, "tensorboard": False, "use_cpu": True},
            **{"accumulation": 1},
        },
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """A host, a run on it, and what one process makes of twice the micro-batches per step."""
    folder = tmp_path_factory.mktemp("processes")
    host = tiny_hosts.write("llava", folder / "host")
    config = write_config(folder, host)
    trained = mllm.train({**config, "train": {**config["train"], "out": str(folder / "one"), "accumulation": 2}})
    return host, config, load_file(trained / TRAINABLES)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_gated_host_trains_alike_on_two_processes_and_stays_itself_at_full(
    launcher: str, one_process: Any, tmp_path: Path
) -> None:
    host, config, expected = one_process
    assert any(value.any() for name, value in expected.items() if ".lora_B" in name)
    out = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "train": {**config["train"], "out": str(out)}}))
    _launch("train", "--config", str(tmp_path / "run.yaml"), *LAUNCHERS[launcher])
    result = load_file(out / TRAINABLES)
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    original, raw = tiny_hosts.load(host, "llava", torch.float32), tiny_hosts.image(seed=9)
    model, processor = mllm.load(out)
    with torch.no_grad():
        logits = original(**adoption.host_inputs(processor, raw, original)).logits
        assert torch.equal(model(**tiny_hosts.inputs(processor, [raw])).logits, logits)


def _launch(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm"]
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
