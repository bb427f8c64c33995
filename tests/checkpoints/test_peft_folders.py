"""A run's LoRA is a folder that PEFT loads on the plain LLM, and PEFT's own folders start a run or are refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.checkpoints.peft_folders import CONFIG_FILE, WEIGHTS_FILE, load_lora
from mllm.config.model import AdapterConfig, LoraBankConfig, LoraConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.training.initialization.start_from import start_from

IDS = torch.arange(12)[None] + 30


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_parts(tmp_path_factory.mktemp("parts"))


def built(parts: dict[str, str], adapter: AdapterConfig, folder: Path) -> ElasticForConditionalGeneration:
    """A model whose adapter does something, and its run folder."""
    settings = dataclasses.replace(tiny.settings_on(parts, ("audio",)), adapter=adapter)
    model, processor = build(settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:  # zero at first
            parameter.data.normal_(std=0.3, generator=generator)
    set_trainables(model)
    save_run(model, processor, folder)
    return model.eval()


@pytest.fixture(scope="module")
def run(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a LoRA."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    built(parts, LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"]), folder)
    return folder


@torch.no_grad()
def logits_of_peft(llm: str, folder: Path) -> Tensor:
    """What the plain LLM says with a folder that PEFT's own loader has read."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), str(folder)).eval()(IDS).logits


@torch.no_grad()
def logits_of(model: ElasticForConditionalGeneration, **ids: int) -> Tensor:
    return model(input_ids=IDS, **{name: torch.tensor([number]) for name, number in ids.items()}).logits


def test_the_lora_of_a_run_says_the_same_in_peft_on_the_plain_llm(parts: dict[str, str], run: Path) -> None:
    model, _ = load(run, device="cpu")
    with_adapter = logits_of_peft(parts["llm"], run / "adapter")
    torch.testing.assert_close(with_adapter, logits_of(model), rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(parts["llm"])(IDS).logits
    assert (with_adapter - plain).abs().max() > 0.01
    written = json.loads((run / "adapter" / CONFIG_FILE).read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (4, 8, parts["llm"])


def test_every_expert_of_a_bank_is_a_folder_that_says_what_the_bank_says(parts: dict[str, str], tmp_path: Path) -> None:
    adapter = LoraBankConfig(variant="mss", rank=4, alpha=8, targets=["q_proj"], scales=["audio=/4", "audio=/8"])
    model = built(parts, adapter, tmp_path / "run")
    folders = {path.name for path in (tmp_path / "run" / "adapters").iterdir()}
    assert folders == {"audio=per4", "audio=per8", "shared"}
    said = []
    for number, folder in enumerate(("audio=per4", "audio=per8")):
        said.append(logits_of_peft(parts["llm"], tmp_path / "run" / "adapters" / folder))
        torch.testing.assert_close(said[-1], logits_of(model, scale_ids=number), rtol=1e-5, atol=1e-5)
    assert (said[0] - said[1]).abs().max() > 0.01


def test_a_lora_that_peft_trained_starts_a_run(parts: dict[str, str], run: Path, tmp_path: Path) -> None:
    llm = get_peft_model(
        LlamaForCausalLM.from_pretrained(parts["llm"]),
        PeftConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        expected = llm.eval()(IDS).logits
    llm.save_pretrained(str(tmp_path / "theirs"))
    model, _ = load(run, device="cpu")
    names = start_from(model, tmp_path / "theirs")
    assert len(names) == 8  # two layers, two targets, two matrices
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def changed(run: Path, folder: Path, **config: Any) -> Path:
    """A copy of a run's adapter with other settings."""
    shutil.copytree(run / "adapter", folder)
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(values | config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "is more than a plain LoRA: use_dora True"),
        ({"rank_pattern": {"q_proj": 2}, "bias": "all"}, "bias 'all', rank_pattern"),
        ({"of_tomorrow": 3}, "is more than a plain LoRA: of_tomorrow 3"),
        ({"peft_type": "IA3"}, "is an adapter of PEFT's type IA3; only LORA is read"),
        ({"r": 8}, "model.adapter.rank is 4; the LoRA in .* has 8"),
        ({"lora_alpha": 16}, "model.adapter.alpha is 8.0; the LoRA in .* has 16"),
    ],
)
def test_what_would_be_lost_or_is_another_adapter_is_refused(
    run: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model, _ = load(run, device="cpu")
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_lora(model, changed(run, tmp_path / "changed", **config))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_tensors_that_do_not_fit_are_named(run: Path, tmp_path: Path) -> None:
    model, _ = load(run, device="cpu")
    tensors = load_file(run / "adapter" / WEIGHTS_FILE)
    first = sorted(tensors)[0]
    for number, (wrong, message) in enumerate(
        (
            ({key: value for key, value in tensors.items() if key != first}, "has only one of lora_A and lora_B"),
            ({key: value for key, value in tensors.items() if ".0." not in key}, r"layers\.0\..* is not in it"),
            ({**tensors, first: tensors[first][:, :5].contiguous()}, r"has shape \(4, 5\), here \(4, 32\)"),
            ({**tensors, "lm_head.weight": torch.zeros(2)}, "lm_head.weight is no matrix of a LoRA"),
        )
    ):
        folder = changed(run, tmp_path / str(number))
        save_file(wrong, folder / WEIGHTS_FILE)
        with pytest.raises(ValueError, match=message):
            load_lora(model, folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {WEIGHTS_FILE}"):
        load_lora(model, folder)
