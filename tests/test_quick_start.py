"""The quick start of the README works as printed: every line, in order, after a demo, in a folder that is no clone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from toy_server import server

ROOT = Path(__file__).parent.parent
QUICK_START = (ROOT / "README.md").read_text().split("## Quick start")[1].split("\n## ")[0]
SHORT_DEMO = (
    "demo --steps 4 --num_utterances 24 --num_test_utterances 4 --num_scenes 24 --num_test_scenes 4 --judge false"
)


SERVING = (ROOT / "docs" / "serving.md").read_text().split("\n## ")[0]


def blocks_after(words: str) -> list[tuple[str, str]]:
    """The fenced blocks behind a phrase of the quick start, each with the name of its language."""
    return re.findall(r"```(\w*)\n(.*?)```", QUICK_START.split(words)[1], re.S)


def lines_of(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with `mllm` on its PATH, where a short demo was run."""
    made = tmp_path_factory.mktemp("quick start")
    (made / "bin").mkdir()
    (made / "bin" / "mllm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mllm "$@"\n')
    (made / "bin" / "mllm").chmod(0o755)
    typed(made, f"mllm {SHORT_DEMO}")
    return made


def typed(folder: Path, line: str) -> str:
    """Run a line as a user types it there; what it writes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_what_is_typed_about_the_demo_works_as_printed(folder: Path) -> None:
    (_, lines), (language, python), (_, exported), *_ = blocks_after("the files that the demo leaves")
    assert len(lines_of(lines)) >= 5
    said = [typed(folder, line) for line in lines_of(lines)]
    assert "soft tokens: audio " in said[0]
    assert "soft tokens: image 16;" in said[1]
    assert (folder / "exported" / "model.safetensors").is_file()
    assert language == "python"
    (folder / "quick_start.py").write_text(python)
    assert re.search(r"\{'image': 16\}\n", typed(folder, f"'{sys.executable}' quick_start.py"))
    (folder / "exported.py").write_text(exported)
    assert "generated_text" in typed(folder, f"'{sys.executable}' exported.py")


@pytest.mark.slow
def test_what_is_asked_of_a_server_is_answered_as_printed(folder: Path) -> None:
    readme, docs = blocks_after("answers over HTTP")[:2], re.findall(r"```(\w*)\n(.*?)```", SERVING, re.S)
    assert readme[0][1].startswith(start := "mllm serve --model runs/demo\n")
    assert docs[0][1].endswith(start)
    with server(folder / "runs" / "demo") as running:

        def answered(lines: str) -> list[str]:
            commands = re.split(r"^(?=curl )", lines.replace("http://127.0.0.1:8000", running.address), flags=re.M)[1:]
            return [typed(folder, command) for command in commands]

        def said(python: str) -> str:
            (folder / "client.py").write_text(python.replace("http://127.0.0.1:8000", running.address))
            return typed(folder, f"'{sys.executable}' client.py")

        (audio,), (image, video) = answered(readme[0][1]), answered(docs[1][1])
        assert '"audio_tokens":' in audio
        assert '"budget":"image=16"' in image
        assert '"video_tokens":' in video
        assert "image_tokens=16" in said(readme[1][1])
        assert "audio=/8" in said(docs[2][1])


@pytest.mark.slow
def test_ones_own_media_come_from_a_manifest_to_an_answer_as_printed(folder: Path) -> None:
    (_, manifest), (_, lines), *_ = blocks_after("With your own media")
    media_folder = folder / "own"
    media_folder.mkdir()
    shutil.copytree(folder / "bin", media_folder / "bin")
    (media_folder / "train.jsonl").write_text(" ".join(manifest.split("\n")) + "\n")
    Image.open(ROOT / "tests" / "fixtures" / "astronaut_face.jpg").save(media_folder / "a1.png")
    said = [typed(media_folder, line) for line in lines_of(lines)]
    assert "1 good samples" in said[0]
    assert "soft tokens: image 16;" in said[-1]
    assert (media_folder / "runs" / "small" / "trainables.safetensors").is_file()
