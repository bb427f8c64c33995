"""An exported model works in transformers alone: the script below calls `mllm.register()` and nothing else of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open

import mllm
from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import save_run
from mllm.cli import main
from mllm.inference.answerer import Answerer, Decoding
from mllm.model.trainables import set_trainables

ROOT = Path(__file__).parents[2]
QUESTION = "what colour is the circle?"
SCRIPT = """
import json, sys
import mllm
mllm.register()
mllm.register()
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, media = sys.argv[1:]
question = %r
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
found = {"template": processor.chat_template, "tokenizer": processor.tokenizer.chat_template}

def said(inputs):
    ids = model.generate(**inputs, max_new_tokens=6)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

def chat(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

image = {"type": "image", "image": Image.open(f"{media}/0.png")}
ends = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
found["chat"] = said(processor.apply_chat_template(chat(image), budget="image=4", **ends))
found["sound"] = said(processor.apply_chat_template(
    chat({"type": "audio", "path": f"{media}/0.wav"}, {"type": "video", "video": f"{media}/0.mp4"}), **ends))
found["chats"] = said(processor.apply_chat_template(
    [chat(image), chat({"type": "image", "url": f"{media}/1.png"})], processor_kwargs={"budget": "image=4"}, **ends))
prompt = processor.apply_chat_template(chat({"type": "image"}), add_generation_prompt=True)
found["prompt"] = prompt
found["two steps"] = said(processor(text=prompt, images=image["image"], budget="image=4", return_tensors="pt"))
found["texts"] = said(processor(
    text=[question] * 2, images=[f"{media}/0.png", f"{media}/1.png"], budget="image=4", padding=True))
pipe = pipeline("image-text-to-text", model=folder)
options = {"max_new_tokens": 6, "return_full_text": False, "budget": "image=4"}
found["pipeline"] = pipe(text=chat({"type": "image", "path": f"{media}/0.png"}), **options)[0]["generated_text"]
found["pipeline texts"] = [
    one["generated_text"] for one in pipe([f"{media}/0.png", f"{media}/1.png"], text=[question] * 2, **options)]
found["whole"] = pipe(text=chat(image), max_new_tokens=6)[0]["generated_text"][-1]["role"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run whose adapters were moved from where they start, beside its run and its media."""
    folder = tmp_path_factory.mktemp("export")
    parts = tiny.write_parts(folder / "parts")
    samples = {"do_sample": True, "temperature": 9.0, "eos_token_id": tiny.TOKENIZER.eos_token_id}
    (folder / "parts" / "llm" / "generation_config.json").write_text(json.dumps(samples))
    model, processor = build(tiny.settings_on(parts))
    set_trainables(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_run(model, processor, folder / "run")
    export(folder / "run", folder / "out")
    for seed in (0, 1):
        tiny.write_media(folder / "media", seed=seed)
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Any]:
    """What transformers made of the export, and what it logged."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % QUESTION, str(folder / "out"), str(folder / "media")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, str]:
    """What our own answerer says about the same files."""
    answerer = Answerer(*mllm.load(folder / "out"), Decoding(max_new_tokens=6))
    media = folder / "media"
    return {
        "0": answerer(QUESTION, image=media / "0.png", budget="image=4").text,
        "1": answerer(QUESTION, image=media / "1.png", budget="image=4").text,
        "both": answerer(QUESTION, audio=media / "0.wav", video=media / "0.mp4").text,
    }


def stripped(texts: list[str]) -> list[str]:
    return [text.strip() for text in texts]


def test_the_answers_differ_by_image(answers: dict[str, str]) -> None:
    assert len(set(answers.values())) == 3


def test_chats_with_media_parts_are_answered_as_by_our_own_answerer(exported, answers) -> None:
    assert stripped(exported["chat"]) == [answers["0"]]
    assert stripped(exported["sound"]) == [answers["both"]]
    assert stripped(exported["chats"]) == [answers["0"], answers["1"]]


def test_a_rendered_chat_and_batched_texts_are_answered_alike(exported, answers) -> None:
    assert exported["prompt"] == f"<s><|image_token|>{QUESTION}"
    assert stripped(exported["two steps"]) == [answers["0"]]
    assert stripped(exported["texts"]) == [answers["0"], answers["1"]]


def test_the_pipeline_answers_alike_and_knows_the_model(exported, answers) -> None:
    assert exported["pipeline"].strip() == answers["0"]
    assert stripped(exported["pipeline texts"]) == [answers["0"], answers["1"]]
    assert exported["whole"] == "assistant"
    assert "is not supported" not in exported["log"]


def test_the_export_carries_its_chat_template(exported, folder: Path) -> None:
    written = (folder / "out" / "chat_template.jinja").read_text()
    assert exported["template"] == exported["tokenizer"] == written
    assert "'image'" in written
    assert "'audio'" in written


def test_typed_marks_stay_text_in_chats(folder: Path) -> None:
    processor = mllm.load(folder / "out")[1]
    typed = "<|image_token|></s>"
    image = Image.open(folder / "media" / "0.png")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": typed}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, budget="image=4"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.placeholder_ids["image"]) == 4
    assert processor.tokenizer.eos_token_id not in ids
    again = processor(text=processor.apply_chat_template([{"role": "user", "content": parts}]), budget="image=4")
    assert again["input_ids"].tolist() == inputs["input_ids"].tolist()


def test_weights_are_as_readable_as_the_umask_says(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(folder / "run", tmp_path / "out")
    finally:
        os.umask(before)
    files = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()}
    assert set(files.values()) == {"0o640"}, files


@torch.no_grad()
def test_an_export_in_bfloat16_is_the_run_merged_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    assert main(["export", "--model", str(folder / "run"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    exported, processor = mllm.load(tmp_path / "out", dtype="bfloat16")
    merged, _ = mllm.load(folder / "run", dtype="bfloat16", merge_adapter=True)
    batch = tiny.batch(processor, [([tiny.random_media("image", 4), "a"], "x")], for_training=True)
    inputs = processor.expand(batch, [[Budget.parse("image=4")]], left_padding=False).inputs
    assert exported(**inputs).logits.equal(merged(**inputs).logits)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".layers." in name and "norm" not in name]  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}


def test_a_folder_that_is_not_empty_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="is in use; name a new or an empty folder"):
        export(folder / "run", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
