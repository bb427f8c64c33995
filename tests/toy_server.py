"""A run folder of a tiny model whose answers differ, its media, and a real server process on loopback."""

import base64
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import tiny
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
# One for all requests, since each client reads the machine's certificates anew; a connection of its own for each.
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
NAME = "toy"
MAX_REQUESTS = 48
"""What the server that most tests share takes at once."""


def write_run(
    folder: Path,
    media: Sequence[str] = ("image", "audio", "video"),
    *,
    text: Mapping[str, Any] | None = None,
    chat_format: str = "plain",
    adapter: Any = None,
    **changes: Any,
) -> Path:
    """Save a tiny run; its weights are far enough from zero that different requests have different answers.

    `changes` are by medium, as in `tiny.settings_on`; `text` changes the config of the LLM, and
    `adapter` stands in place of a LoRA.
    """
    from mllm.checkpoints.build import build
    from mllm.checkpoints.load import save_run
    from mllm.model.trainables import set_trainables

    parts = tiny.write_parts(folder / "parts", **(text or {}))
    for part in parts.values():
        file = Path(part) / "model.safetensors"
        weights = {name: 4 * value if value.dim() > 1 else value for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    settings = replace(tiny.settings_on(parts, media, **changes), chat_format=chat_format)
    model, processor = build(settings if adapter is None else replace(settings, adapter=adapter))
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if ".lora_B" in name:
            value.data.normal_(std=0.1, generator=generator)
        elif "compressors" in name and value.dim() > 1:
            value.data.mul_(4)
    set_trainables(model)
    save_run(model, processor, folder / NAME)
    return folder / NAME


@dataclass
class Running:
    """A server process: its address, its process, and what it wrote."""

    address: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The beginning of OpenAI's routes."""
        return f"{self.address}/v1"

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


@contextmanager
def server(
    run: Path,
    *words: str,
    key: str | None = None,
    seconds: float = 300,
    command: str = "serve",
    use_cpu: bool = True,
    modules: Sequence[Path] = (),
) -> Iterator[Running]:
    """`mllm serve`, or another command, in a process of its own, on a free port; `modules` are folders of imports."""
    paths = os.pathsep.join(map(str, [ROOT, *modules]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment |= {} if key is None else {"MLLM_API_KEY": key}
    line = [sys.executable, "-m", "mllm", command, "--model", str(run), "--port", "0"]
    line += ["--use_cpu"] if use_cpu else []
    process = subprocess.Popen(
        [*line, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run.parent,
    )
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    lines: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"at (http://\S+)/v1", line):
                break
        else:
            raise AssertionError(f"the server did not start:\n{''.join(lines)}")
        timer.cancel()
        running = Running(match[1], process, lines)
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        yield running
        assert process.poll() is None, f"the server ended by itself:\n{''.join(lines)}"
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


TYPES = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}


def data_url(medium: str, content: bytes) -> str:
    """A file as a data URL."""
    return f"data:{TYPES[medium]};base64,{base64.b64encode(content).decode()}"


def part(medium: str, content: bytes, **beside: Any) -> dict[str, Any]:
    """A medium as a part of a message; `beside` goes into the object that holds it."""
    if medium == "audio" and "url" not in beside:
        inner = {"data": base64.b64encode(content).decode(), "format": "wav", **beside}
        return {"type": "input_audio", "input_audio": inner}
    return {"type": f"{medium}_url", f"{medium}_url": {"url": data_url(medium, content), **beside}}


def user(*parts: Any) -> list[dict[str, Any]]:
    """One message of a user; texts stand for themselves."""
    content = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
    return [{"role": "user", "content": content}]
