"""Prompts and features of a Voxtral are those of mistral-common, which a run on one does without."""

import base64
import importlib
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_hosts
import tiny_tekken
import torch
import transformers as hf

import mllm
from mllm.budget import Budget
from mllm.checkpoints import adoption
from mllm.checkpoints.load import save_run
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.hosts.tekken import read_tekken_tokenizer, tekken_template
from mllm.media import Audio
from mllm.model.trainables import set_trainables
from mllm.training.pipeline.token_scan import extents_of

TEXTS = [
    *("what is this?", " this", "this  this\n\n what\t is", "äöü 今日は 🙂\r\n12345", "a\u00a0b", ""),
    *("[INST] [AUDIO] </s> <pad>[/INST]", "<SPECIAL_20>", "don't\n"),
]
"""What people write, also what looks like special tokens."""
ROOT = Path(mllm.__file__).parent.parent
HAS_LIBRARY = importlib.util.find_spec("mistral_common") is not None


def clip(seconds: float, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


def encoded(samples: np.ndarray) -> str:
    """A file of the very samples, as the library takes it."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype="FLOAT")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.skipif(HAS_LIBRARY, reason="mistral-common is installed")
def test_without_mistral_common_a_voxtral_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_hosts.write("voxtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are made by mistral-common: pip install -e '\.\[voxtral\]' in the folder"):
        adoption.probe(folder)
    findings = adoption.examine(folder)
    assert (findings.tokens_per_second, findings.whole_seconds, findings.budgets[0]) == (12.5, 30, "/1")


def test_a_folder_without_a_tekken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"tekken\.json"):
        read_tekken_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (tiny_tekken.tekken(with_audio=False), r"makes no prompts with audio of .*tekken\.json$"),
        ({**tiny_tekken.tekken(), "config": {"version": "v0"}}, r"cannot read .*tekken\.json: Unknown version"),
        ({}, r"cannot read .*tekken\.json: 'config'$"),
    ],
)
def test_a_tekken_file_of_another_kind_is_refused(contents: Any, message: str, tmp_path: Path) -> None:
    tiny_hosts.require("voxtral")
    (tmp_path / "tekken.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"^mistral-common {message}"):
        tekken_template(str(tmp_path))


def test_the_fast_tokenizer_gives_the_ids_of_the_library(adopted: Any) -> None:
    _model, processor, host = adopted("voxtral")
    library = hf.AutoTokenizer.from_pretrained(host.name_or_path)
    assert type(library).__name__ == "MistralCommonBackend"
    for text in TEXTS:
        ids = processor.chat._plain([text], continues=False)[0]
        assert list(ids) == library.encode(text, add_special_tokens=False)
        assert processor.tokenizer.decode(ids) == library.decode(ids) == text
    names = ("bos", "eos", "pad", "unk")
    assert [getattr(processor.tokenizer, f"{one}_token_id") for one in names] == [1, 2, 11, 0]


@pytest.mark.slow
def test_the_fast_tokenizer_gives_the_ids_of_the_library_with_a_whole_vocabulary(tmp_path: Path) -> None:
    tiny_hosts.require("voxtral")
    library = importlib.import_module("mistral_common")
    tekken = importlib.import_module("mistral_common.tokens.tokenizers.tekken")
    shutil.copy(Path(library.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    expected = tekken.Tekkenizer.from_file(tmp_path / "tekken.json")
    backend = read_tekken_tokenizer(str(tmp_path)).backend_tokenizer
    backend.encode_special_tokens = True
    rng, scripts = random.Random(0), ((32, 127), (0xA0, 0x500), (0x900, 0x980), (0x3000, 0x9FFF), (0x1F300, 0x1F700))
    signs = [chr(rng.randrange(*rng.choice(scripts))) if rng.random() < 0.8 else " " for _ in range(20_000)]
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/adopt.md")]
    for text in (*TEXTS, *("".join(signs[start : start + 60]) for start in range(0, len(signs), 60)), *pages):
        assert backend.encode(text, add_special_tokens=False).ids == expected.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("text", TEXTS[:-3])
def test_conversations_are_prompts_of_the_library(adopted: Any, text: str) -> None:
    _model, processor, host = adopted("voxtral")
    sounds = [clip(1.0), clip(2.0, seed=1), clip(31.0, seed=2)]
    written = {"type": "text", "text": text or "b"}
    turns = [
        {"role": "user", "content": [{"type": "audio"}, written]},
        {"role": "assistant", "content": [{"type": "text", "text": f"{text}."}]},
        {"role": "user", "content": [written, {"type": "audio"}, {"type": "audio"}, written, written]},
        {"role": "assistant", "content": [{"type": "text", "text": f"b{text}"}]},
    ]
    values = iter(map(encoded, sounds))
    heard = [
        {**turn, "content": [{**p, "base64": next(values)} if p["type"] == "audio" else p for p in turn["content"]]}
        for turn in turns
    ]
    for end, mode in ((3, "test"), (4, "finetuning")):
        library = hf.AutoTokenizer.from_pretrained(host.name_or_path, mode=mode)
        expected = library.apply_chat_template(heard[:end], tokenize=True, return_dict=False)
        ours = processor.apply_chat_template(
            turns[:end], tokenize=True, return_dict=True, audio=[(one, 16_000) for one in sounds]
        )
        assert ours["input_ids"][0].tolist() == expected


def test_instructions_before_audio_are_refused_as_the_library_refuses_them(adopted: Any) -> None:
    _model, processor, _host = adopted("voxtral")
    system = Message("system", (Text("be brief"),))
    with pytest.raises(ValueError, match="Audio chunks are not supported in user message content when system prompt"):
        processor.chat([system, Message("user", (Media("audio", "x"), Text("what?")))])
    ids = processor.chat([system, Message("user", (Text("what?"),))]).ids
    assert processor.tokenizer.decode(ids) == "<s>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]what?[/INST]"


@pytest.mark.parametrize("seconds", [0.01, 30.0, 30.01, 61.0])
def test_clips_are_heard_in_whole_windows_and_counted_by_their_length(
    adopted: Any, seconds: float, tmp_path: Path
) -> None:
    model, processor, host = adopted("voxtral")
    samples = clip(seconds)
    soundfile.write(tmp_path / "clip.wav", samples, 16_000)
    item = processor.host(Audio(samples, 16_000))
    num_windows = -(-len(samples) // 480_000)
    assert (item.tokens, item.values.shape) == (375 * num_windows, (num_windows, 80, 3000))
    sample = Sample("row", (Message("user", (Media("audio", "clip.wav"),)),), task="test", root=tmp_path)
    assert [extent.num_frames for extent in extents_of(sample, processor)] == [item.tokens]
    assert host.config.audio_config.max_source_positions * num_windows == processor.host.family.reads.num_positions(
        host.config, item.tokens
    )
    theirs = adoption.host_inputs(processor, samples, host)
    with torch.no_grad():
        ours = tiny_hosts.inputs(processor, [samples])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(model(**ours).logits, host(**theirs).logits)


def test_clips_of_different_numbers_of_windows_share_a_batch_and_answer_as_alone(adopted: Any) -> None:
    model, processor, _host = adopted("voxtral")
    rows, budgets = [[clip(1.0)], [clip(31.0, seed=1), clip(2.0, seed=2)], [clip(61.0, seed=3)]], ["", "/4", "/2"]
    messages = [Message("user", (*[Media("audio", "x")] * len(row), Text("what?"))) for row in rows]
    batch = processor.batch(
        [Sample(f"row{number}", (message,), task="test") for number, message in enumerate(messages)],
        [[processor.transform("audio", Audio(one, 16_000)) for one in row] for row in rows],
        for_training=False,
    )
    wanted = [Budget.parse(f"audio={one}" if one else "") for one in budgets]
    together = processor.expand(batch, [wanted], left_padding=True).inputs
    assert together["num_audio_tokens"].tolist() == [375, 187, 93, 562]
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        alone = [
            model(**processor(text=["what?"], audio=[[(one, 16_000) for one in row]], budget=str(budget))).logits[0, -1]
            for row, budget in zip(rows, wanted, strict=True)
        ]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_run_on_a_voxtral_needs_the_library_no_more(adopted: Any, tmp_path: Path) -> None:
    model, processor, _host = adopted("voxtral")
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    samples = clip(1.0)
    np.save(tmp_path / "clip.npy", samples)
    script = (
        "import sys; sys.modules['mistral_common'] = None\n"
        "import mllm, numpy, torch\n"
        f"model, processor = mllm.load({str(tmp_path / 'run')!r})\n"
        f"audio = [[(numpy.load({str(tmp_path / 'clip.npy')!r}), 16_000)]]\n"
        "inputs = processor(text=['what is this?'], audio=audio, budget='audio=/2')\n"
        f"torch.save(model(**inputs).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    with torch.no_grad():
        expected = model(**tiny_hosts.inputs(processor, [samples], "audio=/2")).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
