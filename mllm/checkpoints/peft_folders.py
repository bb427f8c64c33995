"""Writes a LoRA as a folder of PEFT's format, and reads one: what others load, and what others trained.

Knows PEFT's files, the names of layers in an LLM, and the adapters of ours that are a LoRA. Does not know runs.

    RUN/adapter/                       of an adapter of kind lora
    RUN/adapters/audio=per4/, ...      of a bank, one folder per scale or task, each together with the shared expert

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLM), "RUN/adapter")
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from mllm.adapters.expert_ids import ExpertNames
from mllm.adapters.lora_bank import PlainLora, lora_of, shared_lora_of
from mllm.checkpoints.tensor_files import write_tensors
from mllm.config.model import LoraBankConfig, LoraConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import trains_in_shards
from mllm.utils.files import aside_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FOLDER, BANK_FOLDER = "adapter", "adapters"
SHARED = "shared"
"""The expert of a bank that rows without media use, and that every other one holds as well."""
PEFT_PREFIX = "base_model.model."
ELASTIC_PREFIX = "model.language_model."
"""Where the decoder is in our own model."""
# Keys of PEFT's config that do not change what the weights mean.
_FREE = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "r", "lora_alpha", "target_modules", "lora_dropout", "init_lora_weights", "megatron_core"),
    *("qalora_group_size", "loftq_config", "runtime_config"),
}


def write_lora(lora: PlainLora, folder: Path, *, prefix: str, llm: str | None = None) -> None:
    """Write one LoRA as a new folder of PEFT's format.

    Args:
        prefix: where the decoder is in the model that the folder is for, such as `model.`.
        llm: what its config calls that model.
    """
    from peft import LoraConfig as PeftConfig

    folder.mkdir(parents=True)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=llm,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (down, up) in lora.weights.items():
        tensors[f"{PEFT_PREFIX}{prefix}{name}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{prefix}{name}.lora_B.weight"] = up.detach().cpu().contiguous()
    write_tensors(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def write_adapters(
    model: ElasticForConditionalGeneration, names: ExpertNames, folder: Path, state: Mapping[str, Tensor]
) -> None:
    """Write the LLM's adapter beside a run's own file, as folders that load on the plain LLM.

    What was there is replaced. Nothing is written of an adapter that is no LoRA, of one beside an LLM that trained
    itself, or of a bank in shards.

    Args:
        names: of the experts of a bank.
        state: what trains, by name, whole and on the CPU.
    """
    adapter = model.config.adapter
    for kept in (FOLDER, BANK_FOLDER):
        shutil.rmtree(folder / kept, ignore_errors=True)
    if "llm" in (model.config.trained_parts or ()) or model.config.host_config is not None:
        return
    prefix = decoder_prefix(model.config.get_text_config())
    llm = ((model.config.sources or {}).get("llm") or {}).get("reference")
    if isinstance(adapter, LoraConfig):
        _write_whole({"": _lora_in(state, adapter)}, folder / FOLDER, prefix=prefix, llm=llm)
    elif isinstance(adapter, LoraBankConfig) and not trains_in_shards(model):
        loras = loras_of_bank(model, names)
        _write_whole(loras, folder / BANK_FOLDER, prefix=prefix, llm=llm)


def loras_of_bank(model: ElasticForConditionalGeneration, names: ExpertNames) -> dict[str, PlainLora]:
    """Copy every expert of a bank, together with the shared one, as a LoRA of its own, by its name."""
    llm = model.model.language_model
    loras = {name: lora_of(llm, scale_id=number) for number, name in enumerate(names.scales)}
    loras |= {name: lora_of(llm, task_id=number) for number, name in enumerate(names.tasks)}
    if (shared := shared_lora_of(llm)) is not None:
        loras[SHARED] = shared
    return loras


def decoder_prefix(config: PreTrainedConfig) -> str:
    """Return where the decoder is in the plain causal LM of an LLM's family, such as `model.`."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return f"{family.base_model_prefix}."


def folder_name(name: str) -> str:
    """Write the name of a scale as that of a folder: `audio=/4` is `audio=per4`."""
    return name.replace("/", "per")


def read_lora(folder: str | Path, prefixes: tuple[str, ...]) -> PlainLora:
    """Read a LoRA of PEFT's format; a pickle is never read.

    Args:
        prefixes: where the decoder may be in the model that the folder was made for.

    Raises:
        FileNotFoundError: the folder lacks one of its two files.
        ValueError: another kind of adapter, a setting that would be lost, or tensors that are no pairs of a LoRA.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; a PEFT adapter is read from {CONFIG_FILE}, {WEIGHTS_FILE}")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _check_config(config, folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (a file of tensors is no mapping)
            layer, matrix = _layer_of(key, prefixes, folder)
            pairs.setdefault(layer, {})[matrix] = file.get_tensor(key)
    if lone := sorted(layer for layer, pair in pairs.items() if len(pair) != 2):
        raise ValueError(f"{folder}: {lone[0]} has only one of lora_A and lora_B")
    targets = sorted({layer.rsplit(".", 1)[-1] for layer in pairs})
    weights = {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in pairs.items()}
    return PlainLora(config["r"], float(config["lora_alpha"]), targets, weights)


@torch.no_grad()
def load_lora(model: ElasticForConditionalGeneration, folder: str | Path) -> list[str]:
    """Put a LoRA of PEFT's format into a model whose adapter is one of the same rank, scale and layers.

    Args:
        folder: made for the plain LLM, or for a model of ours.

    Returns:
        The names of the parameters that were put in.

    Raises:
        FileNotFoundError, ValueError: as `read_lora`; or an adapter of another kind, rank or scale, and layers or
            shapes that differ; the first are named.
    """
    adapter = model.config.adapter
    if not isinstance(adapter, LoraConfig):
        kind = "none" if adapter is None else adapter.kind
        raise ValueError(f"{folder} is a LoRA of PEFT's, but model.adapter is {kind}; use kind lora")
    lora = read_lora(folder, (decoder_prefix(model.config.get_text_config()), ELASTIC_PREFIX))
    for key, wanted, written in (("rank", adapter.rank, lora.rank), ("alpha", adapter.alpha, lora.alpha)):
        if wanted != written:
            raise ValueError(f"model.adapter.{key} is {wanted}; the LoRA in {folder} has {written:g}")
    parameters = dict(model.named_parameters())
    tensors = {
        f"{ELASTIC_PREFIX}{layer}.{matrix}.default.weight": tensor
        for layer, pair in lora.weights.items()
        for matrix, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    expected = {name for name in parameters if name.startswith(ELASTIC_PREFIX) and ".lora_" in name}
    problems = [f"{name} is not in it" for name in sorted(expected - tensors.keys())]
    problems += [f"{name} is not in this model" for name in sorted(tensors.keys() - expected)]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, here {tuple(parameters[name].shape)}"
        for name in sorted(expected & tensors.keys())
        if tensors[name].shape != parameters[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the LoRA in {folder} does not fit model.adapter: {'; '.join(problems[:5])}{more}")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    return sorted(tensors)


def _lora_in(state: Mapping[str, Tensor], adapter: LoraConfig) -> PlainLora:
    """Find the LLM's LoRA among what trains."""
    ending = ".lora_A.default.weight"
    layers = [name.removesuffix(ending) for name in state if name.startswith(ELASTIC_PREFIX) and name.endswith(ending)]
    weights = {
        layer.removeprefix(ELASTIC_PREFIX): (state[f"{layer}{ending}"], state[f"{layer}.lora_B.default.weight"])
        for layer in layers
    }
    return PlainLora(adapter.rank, adapter.alpha, list(adapter.targets), weights)


def _write_whole(loras: Mapping[str, PlainLora], folder: Path, *, prefix: str, llm: str | None) -> None:
    """Write folders aside first, so that a half-written adapter is never taken for one."""
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    for name, lora in loras.items():
        write_lora(lora, aside / folder_name(name), prefix=prefix, llm=llm)
    aside.rename(folder)


def _check_config(config: Any, folder: Path) -> None:
    """Refuse what is no plain LoRA: a setting that was left unread would change what the weights mean.

    Raises:
        ValueError: with the settings.
    """
    from peft import LoraConfig as PeftConfig

    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder} is an adapter of PEFT's type {kind}; only LORA is read")
    defaults = {field.name: field.default for field in dataclasses.fields(PeftConfig)}
    changed = [
        f"{key} {value!r}"
        for key, value in config.items()
        if key not in _FREE and value not in (None, False, [], {}) and value != defaults.get(key)
    ]
    if changed:
        raise ValueError(f"{folder} is more than a plain LoRA: {', '.join(changed)}")


def _layer_of(key: str, prefixes: tuple[str, ...], folder: Path) -> tuple[str, str]:
    """Return the layer of the decoder that a tensor belongs to, and which of the two matrices it is."""
    name = key.removeprefix(PEFT_PREFIX)
    for prefix in prefixes:
        for matrix in ("lora_A", "lora_B"):
            ending = f".{matrix}.weight"
            if name.startswith(prefix) and name.endswith(ending) and key != name:
                return name[len(prefix) : -len(ending)], matrix
    raise ValueError(f"{folder}: {key} is no matrix of a LoRA in {' or '.join(prefixes)}")
