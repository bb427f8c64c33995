"""Frozen LLMs in 8 and 4 bits: what is quantised and what is not, what learns beside it, and where it is refused.

bitsandbytes also computes on a CPU, slowly: so the ways of loading and learning are run for real, in an environment
that has it (`make test-liger`). On a GPU it was never run.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import tiny
import tiny_hosts
import torch
from blocks import medium
from torch import nn
from transformers import LlamaForCausalLM

from mllm.adapters import build_adapter
from mllm.checkpoints import pretrained
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.pretrained import load_checked
from mllm.checkpoints.quantization import bits_options
from mllm.config.model import Int8Config, LoraConfig, ModelConfig, MomeConfig, Nf4Config, QuantizationConfig
from mllm.config.reading import read
from mllm.config.run import read_run_config
from mllm.model.configuration import ElasticConfig
from mllm.model.precision import dtype_of

SYNTHETIC = {"llm": "synthetic:llm", "chat_format": "plain"}
IMAGE = medium("image", {"encoder": {"source": "synthetic:vision"}, "compressor": "pool", "budgets": [1, 4]})
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None and "REQUIRE_LIGER" not in os.environ,
    reason="bitsandbytes is not installed; run `make test-liger`",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as hubs hold it."""
    out = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llm_config(hidden_size=64, intermediate_size=128)).eval().save_pretrained(out)
    return out


def loaded(folder: Path, quantization: QuantizationConfig | None) -> LlamaForCausalLM:
    config = tiny.llm_config(hidden_size=64, intermediate_size=128)
    options = {}
    if quantization is not None:
        options = bits_options(quantization, dtype=torch.float32, device=torch.device("cpu"))
    model = load_checked(LlamaForCausalLM, str(folder), config, dtype=torch.float32, **options)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_before_anything_is_loaded() -> None:
    config = ModelConfig(**SYNTHETIC, image=IMAGE, adapter=LoraConfig(), quantization=Nf4Config())
    with pytest.raises(ValueError, match=r"model.quantization keeps weights in 8 or 4 bits .* PyTorch sees none here"):
        build(config)


def test_weights_of_few_bits_do_not_train() -> None:
    model = {**SYNTHETIC, "quantization": "nf4", "image": {"encoder": "synthetic:vision", "budgets": [1, 4]}}
    values = {"model": model, "data": {"train": ["x.jsonl"]}, "train": {"out": "x", "max_steps": 1}}
    assert read_run_config(values).model.quantization == Nf4Config()
    with pytest.raises(ValueError, match=r"train.parts holds llm, but weights of model.quantization do not train"):
        read_run_config({**values, "train": {**values["train"], "parts": ["compressors", "llm"]}})
    with pytest.raises(ValueError, match=r"model.quantization.kind is '?int4"):
        read_run_config({**values, "model": {**model, "quantization": "int4"}})


def test_a_config_on_disk_says_how_the_llm_is_kept_and_its_export_is_refused(tmp_path: Path) -> None:
    config = tiny.config(tiny.settings(["image"]))
    config.quantization = Int8Config(threshold=5.0)
    config.save_pretrained(tmp_path / "run")
    assert ElasticConfig.from_pretrained(tmp_path / "run").quantization == Int8Config(threshold=5.0)
    with pytest.raises(ValueError, match=r"merges its adapter, but the LLM is kept as int8"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_library
@pytest.mark.parametrize(("quantization", "least"), [(Int8Config(), 0.999), (Nf4Config(), 0.97)], ids=["int8", "nf4"])
def test_linear_layers_have_few_bits_and_answers_stay_close(
    folder: Path, quantization: QuantizationConfig, least: float
) -> None:
    ids = torch.arange(1, 41)[None]  # no padding, whose embedding is zero
    plain, few = loaded(folder, None), loaded(folder, quantization)
    bits = {
        name for name, layer in few.named_modules() if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    }
    assert bits == {name for name, layer in plain.model.named_modules(prefix="model") if isinstance(layer, nn.Linear)}
    assert dtype_of(few) == torch.float32  # of norms and embeddings, which soft tokens go by
    with torch.no_grad():
        same = nn.functional.cosine_similarity(plain(ids).logits, few(ids).logits, dim=-1)
    assert same.min() > least


@needs_library
@pytest.mark.parametrize("adapter", [LoraConfig(rank=4), MomeConfig(num_experts=2, top_k=1, bottleneck=4)], ids=str)
def test_adapters_learn_beside_them(folder: Path, adapter: LoraConfig | MomeConfig) -> None:
    model = loaded(folder, Nf4Config())
    build_adapter(model.model, adapter)
    model.lm_head.requires_grad_(False)
    # On a CPU the library lays quantised weights out anew when they are first used, so bytes say nothing.
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.is_floating_point()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    ids = torch.arange(1, 41)[None]  # no padding, whose embedding is zero
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    changed = {name for name in before if not torch.equal(model.get_parameter(name), before[name])}
    assert changed
    assert not {name for name in changed if ".lora_" not in name and ".mome." not in name}


@needs_library
def test_names_and_shapes_are_checked_before_weights_are_quantised(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"{name} has shape \(127, 64\), the model has \(128, 64\)"):
        loaded(tmp_path, Nf4Config())


@needs_library
def test_the_llm_of_a_host_has_few_bits_and_its_encoder_and_projector_have_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is asked for; the library computes on a CPU as well."""
    monkeypatch.setattr(pretrained, "quantization_device", lambda: torch.device("cpu"))
    for key, value in {"hidden_size": 64, "intermediate_size": 128}.items():  # the library's least
        monkeypatch.setitem(tiny_hosts.TEXT, key, value)
    source = tiny_hosts.write("llava", tmp_path / "host")
    values = {"host": source, "image": {"budgets": [36, 4]}, "adapter": {"kind": "gated_lora", "rank": 4}}
    model, processor = build(read(ModelConfig, {**values, "quantization": "nf4"}, path="model"))
    few = {name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".layers." in name]
    of_llm = {name for name in layers if name.startswith("model.language_model.") and "lora" not in name}
    assert few
    assert few == of_llm
    raw = tiny_hosts.medium("llava")
    full, reduced = (tiny_hosts.inputs(processor, [raw], budget) for budget in ("", "image=4"))
    with torch.no_grad():
        before = [model(**inputs).logits for inputs in (full, reduced)]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.5)
        after = [model(**inputs).logits for inputs in (full, reduced)]
    assert before[0].isfinite().all()
    assert after[0].equal(before[0])
    assert not after[1].equal(before[1])
