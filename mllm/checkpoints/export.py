"""Writes a run as one standalone checkpoint, tensor by tensor: adapters merged, frozen parts and processor included.

Knows runs, adapters, and how hubs hold a model. Does not know training state.

    run ── load, weights left in files ── merge ── names as transformers saves them ── compute and write file by file

A folder gets its `config.json` last, and its manifest behind that; without a config nothing loads it. So of an export
that was killed nothing can be taken for a model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mllm.adapters import merge_adapters, select_experts
from mllm.checkpoints.deferred import DeferredWeights
from mllm.checkpoints.expert_folders import write_experts
from mllm.checkpoints.load import check_mergeable, load
from mllm.checkpoints.tensor_files import write_shards
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import part_of
from mllm.processing.processor import ElasticProcessor
from mllm.utils.files import new_folder
from mllm.utils.run_paths import model_folder
from mllm.utils.sealing import files_below, seal_folder

ExportForm = Literal["model", "llm", "experts"]


def export(
    folder: str | Path,
    out: str | Path,
    *,
    scale: str | None = None,
    task: str | None = None,
    checkpoint: str | int | None = None,
    sources: Mapping[str, str] | None = None,
    form: ExportForm = "model",
    dtype: str | torch.dtype = "float32",
) -> None:
    """Write a run as one standalone checkpoint: adapters merged, frozen parts and processor included.

    The adapter of a host stays beside its weights: merged, it would change the answers at the full budget.

    `AutoModelForImageTextToText` and `AutoProcessor` load it after `mllm.register()`. Weights are read, merged and
    written one after the other, in files of 512 MiB; adapters and compressors are in memory, LLM and encoders are not.

    Args:
        scale, task: of an adapter with experts per scale or task, the ones whose answers the checkpoint gives; every
            row is then served by them, whatever it costs.
        out: a folder that is not there yet, or is empty.
        checkpoint, sources: as in `load`.
        form: `model` for all of it; `llm` for the LLM alone, as a plain checkpoint of its family with its tokenizer,
            for engines that are handed embeddings; `experts` for every expert of a bank as a LoRA folder beside an LLM
            without them, for engines that choose one per request (see `mllm.checkpoints.expert_folders`).
        dtype: of the frozen parts, as in `load`; the adapter is merged in it.

    Raises:
        ValueError: a folder that holds something, an adapter that cannot be merged, a quantised LLM, or a scale or task
            that is missing or that it has not.
        WriteError: the disk refuses it.
    """
    if form not in get_args(ExportForm):
        raise ValueError(f"form is {form!r}; it is one of {', '.join(get_args(ExportForm))}")
    if form == "experts" and (scale or task):
        raise ValueError("form is experts, which writes every expert; it does not go with scale or task")
    home = model_folder(folder, checkpoint)
    check_mergeable(ElasticConfig.from_pretrained(home), f"an export of {home} merges its adapter")
    weights = DeferredWeights()
    with new_folder(out) as new:
        with weights, torch.no_grad():
            model, processor = load(folder, dtype=dtype, device="cpu", checkpoint=checkpoint, sources=sources)
            if model.config.host_config is not None:
                if scale or task or form != "model":
                    raise ValueError(
                        f"{folder} is a model on a host, which is exported as it is; leave out scale, task and form"
                    )
                model.config.holds_adapter = model.config.adapter is not None
            else:
                if form == "experts":
                    write_experts(model, processor.expert_names, new)
                else:
                    select_experts(
                        model.model.language_model,
                        scale_id=_index_of("scale", scale, processor.expert_names.scales),
                        task_id=_index_of("task", task, processor.expert_names.tasks),
                    )
                _merge(model, processor, weights)
            model.config.sources = {}
            model.generation_config = _greedy(model, processor)
            alone = _plain_llm(model) if form == "llm" else model
        (processor.tokenizer if form == "llm" else processor).save_pretrained(new)
        _write(alone, weights, new)
        seal_folder(new, files_below(new))


def _merge(model: ElasticForConditionalGeneration, processor: ElasticProcessor, weights: DeferredWeights) -> None:
    """Merge the adapters of the LLM and of encoders, so that nothing tells of them any more."""
    weights.hold(parameter for name, parameter in model.named_parameters() if part_of(name) == "adapter")
    merge_adapters(model)
    processor.forget_experts()
    model.config.adapter = None
    media = model.config.media or {}
    for medium, block in model.config.encoded_media.items():
        media[medium] = replace(block, encoder=replace(block.encoder, adapter=None))


def _plain_llm(model: ElasticForConditionalGeneration) -> PreTrainedModel:
    """Put the decoder and the head into a model of the LLM's own family; weights are shared, not copied."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(model.config.text_config, trust_remote_code=False)
    llm.base_model.load_state_dict(model.model.language_model.state_dict(), assign=True)
    llm.get_output_embeddings().load_state_dict(model.lm_head.state_dict(), assign=True)
    llm.generation_config = model.generation_config
    return llm


def _write(model: PreTrainedModel, weights: DeferredWeights, folder: Path) -> None:
    """Write a model as its `save_pretrained` would, which has all of it in memory; its config last.

    Raises:
        WriteError: the disk refuses it.
    """
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, model)
    with weights:
        state = revert_weight_conversion(model, state)
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    write_shards(sizes, lambda name: weights.compute(state[name]), folder)
    model.generation_config.save_pretrained(folder)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _greedy(model: ElasticForConditionalGeneration, processor: ElasticProcessor) -> GenerationConfig:
    """Return how an export generates by itself: as `Answerer` does, not as its LLM did, which may have sampled."""
    of_llm = model.generation_config
    ends = {processor.tokenizer.eos_token_id}
    ends |= set(of_llm.eos_token_id) if isinstance(of_llm.eos_token_id, list) else {of_llm.eos_token_id}
    return GenerationConfig(
        bos_token_id=of_llm.bos_token_id,
        eos_token_id=sorted(ends - {None}) or None,
        pad_token_id=processor.pad_id,
        suppress_tokens=model.config.unsaid_ids or None,
    )


def _index_of(kind: str, name: str | None, known: tuple[str, ...]) -> int | None:
    """Return the index of an expert; a name is needed where there are experts, and refused where there are none."""
    if name is None and not known:
        return None
    if name not in known:
        raise ValueError(f"{kind} is {name}; the adapter has experts for: {' | '.join(known) or f'no {kind}'}")
    return known.index(name)
