"""What is saved is what is loaded, bit for bit, and nothing that does not fit is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm
from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import TRAINABLES, load, load_for, merge_llm_adapter, save_run
from mllm.config.model import LoraBankConfig
from mllm.config.model_options import ModelOptions
from mllm.media import MediaLimits
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import read_dtype
from mllm.model.trainables import set_trainables, trainable_names
from mllm.processing.processor import ElasticProcessor
from mllm.utils.sealing import unchecked

ROWS = [
    ([tiny.random_media("image"), "what colour is the circle?"], "red"),
    ([tiny.random_media("audio", 37), tiny.random_media("video", 19), "transcribe speech and video to text."], "now"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose trainables were moved away from where a seed puts them."""
    folder = tmp_path_factory.mktemp("loading")
    model, processor = build(tiny.settings_on(tiny.write_parts(folder / "parts")))
    set_trainables(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_run(model, processor, folder / "run")
    torch.save(logits(model, processor), folder / "logits")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """An export of it, which nobody changes."""
    export(run, run.parent / "exported")
    return run.parent / "exported"


@pytest.fixture(scope="module")
def loaded(run: Path) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """The run as it is loaded, which nobody changes."""
    return load(run)


def logits(model, processor) -> torch.Tensor:
    inputs = processor.expand(tiny.batch(processor, ROWS), [[Budget()] * 2], left_padding=False).inputs
    with torch.no_grad():
        return model(**inputs).logits


def expected(run: Path) -> torch.Tensor:
    return torch.load(run.parent / "logits", weights_only=True)


def test_a_loaded_run_gives_the_same_logits_bit_for_bit(run: Path, loaded) -> None:
    model, processor = loaded
    assert torch.equal(logits(model, processor), expected(run))
    assert not model.training
    saved = load_file(run / TRAINABLES)
    assert sorted(saved) == trainable_names(model)


def test_the_checkpoint_holds_exactly_what_trains(run: Path) -> None:
    names = sorted(load_file(run / TRAINABLES))
    lora = [
        f"model.language_model.layers.{layer}.self_attn.{target}.lora_{side}.default.weight"
        for layer in (0, 1)
        for target in ("q_proj", "v_proj")
        for side in "AB"
    ]
    banks = {"audio": [0], "image": [0], "video": [0, 1]}  # the stacking compressor has one projector per rate
    projectors = [
        f"model.compressors.{medium}.projectors.{index}.{layer}.{kind}"
        for medium, indices in banks.items()
        for index in indices
        for layer in (0, 2)
        for kind in ("bias", "weight")
    ]
    assert names == sorted(lora + projectors)


def test_an_export_stands_alone_and_gives_the_same_answers(run: Path, exported: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    processor = AutoProcessor.from_pretrained(exported)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(model, processor), expected(run), rtol=1e-4, atol=1e-5)
    again, _ = mllm.load(exported)
    assert torch.equal(logits(again, processor), logits(model, processor))


MISFITS = {
    r"missing model\.compressors\.audio\.projectors\.0\.0\.weight$": lambda state, name: state.pop(name),
    r"missing .*\.0\.weight; unexpected .*\.0\.weight_x$": lambda state, name: state.update(
        {f"{name}_x": state.pop(name)}
    ),
    r"config: .*\.0\.weight has shape \(3,\), the model has \(\d+, \d+\)$": lambda state, name: state.update(
        {name: torch.zeros(3)}
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_an_export_that_is_not_whole_is_refused_by_name(exported: Path, tmp_path: Path, message: str) -> None:
    shutil.copytree(exported, tmp_path / "out")
    state = load_file(exported / "model.safetensors")
    MISFITS[message](state, "model.compressors.audio.projectors.0.0.weight")
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with unchecked(), pytest.raises(ValueError, match=message):
        load(tmp_path / "out")


def test_an_export_in_several_files_is_read_whole(exported: Path, tmp_path: Path) -> None:
    model, processor = load(exported)
    model.save_pretrained(tmp_path / "several", max_shard_size="50KB")
    processor.save_pretrained(tmp_path / "several")
    again, _ = load(tmp_path / "several")
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    shard = sorted((tmp_path / "several").glob("model-*"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"names {shard.name}, which is not there"):
        load(tmp_path / "several")


BROKEN = {
    "missing model.compressors.audio": lambda state: state.pop(next(n for n in state if "audio" in n)),
    "unexpected model.nonsense": lambda state: state.update({"model.nonsense": torch.zeros(1)}),
    r"has shape \(3,\), the model has": lambda state: state.update({next(iter(state)): torch.zeros(3)}),
    r"has shape \(0,\), the model has": lambda state: state.update({next(iter(state)): torch.zeros(0)}),
}


@pytest.mark.parametrize("message", list(BROKEN))
def test_weights_that_do_not_fit_are_refused_by_name(run: Path, tmp_path: Path, message: str) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / TRAINABLES)
    BROKEN[message](state)
    save_file(state, tmp_path / TRAINABLES)
    with unchecked(), pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_empty_tensor_is_not_saved(loaded, tmp_path: Path) -> None:
    model, processor = loaded
    with pytest.raises(ValueError, match="refusing to save b, which has size 0"):
        save_run(model, processor, tmp_path / "x", state={"a": torch.zeros(1), "b": torch.zeros(0)})
    assert not (tmp_path / "x" / TRAINABLES).exists()


def test_other_frozen_weights_than_it_was_trained_on_are_refused(run: Path) -> None:
    part = run.parent / "parts" / "audio" / "model.safetensors"
    before = part.read_bytes()
    state = load_file(part)
    state[next(iter(state))] += 1
    save_file(state, part, metadata={"format": "pt"})
    try:
        with pytest.raises(ValueError, match=r"the weights of audio in .* are not those this model was trained on"):
            load(run)
    finally:
        part.write_bytes(before)


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model"):
        load(tmp_path)


def test_a_config_with_sizes_that_do_not_fit_is_refused_by_name(tmp_path) -> None:
    parts = tiny.write_parts(tmp_path)
    path = tmp_path / "video" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 3}))
    with pytest.raises(ValueError, match=r"(?s)video is refused: .*num_attention_heads=3 must divide hidden_size="):
        build(tiny.settings_on(parts, ("video",)))


def test_a_merged_adapter_gives_the_same_logits_and_is_gone(run: Path, loaded) -> None:
    model, processor = loaded
    merged, _ = load(run, merge_adapter=True)
    inputs = processor(text="how many objects?")
    with torch.no_grad():
        expected, result = model(**inputs).logits, merged(**inputs).logits
    assert not torch.equal(result, expected)
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert merged.config.adapter is None
    assert not [name for name, _ in merged.model.language_model.named_parameters() if "lora" in name]


def test_a_bank_of_the_shared_expert_is_merged_and_one_per_task_is_refused() -> None:
    for variant, tasks in (("s", []), ("t", ["vqa"])):
        adapter = LoraBankConfig(variant=variant, rank=4, alpha=8, tasks=tasks)
        config = replace(tiny.settings(("audio",), adapter=False), adapter=adapter)
        model, inputs = tiny.model(config), tiny.processor(config)(text="how many objects?")
        expected = model(**inputs).logits
        if tasks:
            with pytest.raises(ValueError, match=r"merge_adapter is true, but .* experts per scale or task depends"):
                merge_llm_adapter(model)
        else:
            merge_llm_adapter(model)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_options_of_a_command_say_what_is_loaded(run: Path) -> None:
    limits = MediaLimits(audio_seconds=5)
    options = ModelOptions(model=str(run), dtype="bfloat16", merge_adapter=True, limits=limits, use_cpu=True)
    model, processor = load_for(options)
    assert model.config.adapter is None
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert processor.limits == limits
    with pytest.raises(FileNotFoundError, match="checkpoint 5 is not in"):
        load_for(replace(options, checkpoint="5"))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("torch.float16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
    ],
)
def test_a_dtype_goes_by_several_names(dtype: str | torch.dtype, expected: torch.dtype) -> None:
    assert read_dtype(dtype) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.bfloat16), ("half", torch.float16)])
def test_frozen_parts_are_in_the_dtype(run: Path, dtype: str | torch.dtype, expected: torch.dtype) -> None:
    model, _ = load(run, dtype=dtype, device="cpu")
    assert model.get_input_embeddings().weight.dtype == expected
    assert next(model.model.compressors.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "bf", torch.int8, "auto"])
def test_another_dtype_is_refused(run: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; allowed: float32, fp32, float, bfloat16, bf16, float16"):
        load(run, dtype=dtype)


def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(run: Path) -> None:
    with pytest.raises(ValueError, match="device is 'gpu'; give one such as cpu, cuda or cuda:1"):
        load(run, device="gpu")
    with pytest.raises(
        ValueError, match=r"device is cuda:99, and PyTorch sees \d+ GPUs here; leave it out, or name cpu"
    ):
        load(run, device="cuda:99")


def test_a_model_is_put_where_it_is_asked_for_and_on_the_gpu_by_itself(run: Path) -> None:
    assert load(run, device="meta")[0].device.type == "meta"
    assert load(run, device=torch.device("cpu"))[0].device.type == "cpu"
    assert load(run)[0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
