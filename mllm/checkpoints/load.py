"""Reads and writes runs, what was trained and what it stands on; reads standalone exports, which `export.py` writes.

Knows folders and names of parameters. Does not know training state; that is `training/checkpoint.py`.

A run folder holds `config.json` (with the sources of the frozen parts and their digests), `trainables.safetensors` and
the processor's files. Nothing is ever unpickled.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mllm.adapters import merge_adapters, select_experts
from mllm.checkpoints.audio_padding import set_audio_padding
from mllm.checkpoints.auto_classes import register
from mllm.checkpoints.build import assemble
from mllm.checkpoints.deferred import DeferredWeights
from mllm.checkpoints.expert_folders import read_experts
from mllm.checkpoints.part_files import SafetensorsFile, StoredTensor
from mllm.checkpoints.peft_folders import write_adapters
from mllm.checkpoints.pretrained import check_layer_counts, known_attention, load_checked
from mllm.checkpoints.sources import find_parts, seen_from
from mllm.checkpoints.tensor_files import num_bytes_of, write_tensors
from mllm.config.model import GatedLoraConfig, LoraBankConfig, MomeConfig
from mllm.config.model_options import ModelOptions
from mllm.media import MediaLimits
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import read_dtype
from mllm.model.trainables import saved_names, set_trainables
from mllm.processing.processor import ElasticProcessor
from mllm.utils.fail_points import fail_point
from mllm.utils.files import flush_to_disk, folder_aside
from mllm.utils.run_paths import MODEL_ASIDE, NEWEST, PROCESSOR, model_folder, run_of
from mllm.utils.sealing import MANIFEST, check_before_load, files_below, renew_seal, seal_folder, unchecked

TRAINABLES = "trainables.safetensors"
ExportForm = Literal["model", "llm", "experts"]


def save_run(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    folder: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a run folder: aside first, then file by file in place, digests last; then its LoRA as others read it.

    Args:
        state: the trainables when they do not lie whole in the model (ZeRO-3); the model's own otherwise.

    Raises:
        WriteError: the disk refuses it; the path, the bytes needed and those that are free are told.
    """
    folder = Path(folder)
    model.config.sources = seen_from(model.config.sources or {}, folder)
    trainables = state if state is not None else trainable_state(model)

    def write(aside: Path) -> None:
        model.config.save_pretrained(aside)
        processor.save_pretrained(aside)
        save_trainables(trainables, aside / TRAINABLES)
        seal_folder(aside, files_below(aside))

    _write_into(folder, write, num_bytes=num_bytes_of(trainables.values()))
    write_adapters(model, processor.expert_names, folder, trainables)


def save_processor(processor: ElasticProcessor, run: Path) -> None:
    """Write the processor of a run, whose checkpoints can then be used however it ends.

    Raises:
        WriteError: as `save_run`. ValueError: the run is finished, and its manifest damaged.
    """

    replaced: list[str] = []

    def write(aside: Path) -> None:
        processor.save_pretrained(aside)
        replaced.extend(files_below(aside))

    _write_into(run, write)
    if (run / MANIFEST).is_file():
        renew_seal(run, replaced)


def _write_into(folder: Path, write: Callable[[Path], None], *, num_bytes: int | None = None) -> None:
    """Write files aside, inside the folder, which may be a disk of its own, then put them in place, the manifest last.

    Raises:
        WriteError: the disk refuses it; what was there is untouched, and nothing is left of what was begun.
    """
    with folder_aside(folder / MODEL_ASIDE, folder, num_bytes=num_bytes) as aside:
        write(aside)
        fail_point("model.written")
        files = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (file.name == MANIFEST, file.name == TRAINABLES)):
            fail_point("model.moving")
            (folder / file).parent.mkdir(parents=True, exist_ok=True)  # of a tokenizer with several chat templates
            os.replace(aside / file, folder / file)
        flush_to_disk(folder)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains, and what is held beside it, by name, detached on the CPU."""
    return values_of(model, saved_names(model))


def values_of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return the named parameters, detached on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if name in names}


def save_trainables(state: Mapping[str, Tensor], path: Path) -> None:
    """Write trainables and flush them to the disk.

    Raises:
        ValueError: an empty tensor, as a part of a sharded model would be; it is named.
    """
    if empty := sorted(name for name, value in state.items() if value.numel() == 0):
        raise ValueError(f"refusing to save {empty[0]}, which has size 0: it was not gathered from its shards")
    write_tensors(state, path, metadata={"format": "pt"})
    flush_to_disk(path)


def load_trainables(model: nn.Module, path: Path, names: Iterable[str], *, beside: Collection[str] = ()) -> None:
    """Load exactly the named parameters into a model.

    Args:
        beside: what else the file may hold, which is left alone.

    Raises:
        ValueError: parameters that are missing, unexpected, of another shape or empty; every one is named.
    """
    expected, file = set(names), SafetensorsFile(path)
    stored = set(file.names())
    problems = [f"missing {name}" for name in sorted(expected - stored)]
    problems += [f"unexpected {name}" for name in sorted(stored - expected - set(beside))]
    parameters = dict(model.named_parameters())
    for name in sorted(expected & stored):
        shape, wanted = file.shape_of(name), tuple(parameters[name].shape)
        if shape != wanted or 0 in shape:
            problems.append(f"{name} has shape {shape}, the model has {wanted}")
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems)}")
    weights = DeferredWeights.current()
    with torch.no_grad():
        for name in expected:
            parameters[name].copy_(StoredTensor(file, name, weights).read(parameters[name].dtype))


def load(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attention: str = "sdpa",
    merge_adapter: bool = False,
    checkpoint: str | int | None = None,
    sources: Mapping[str, str] | None = None,
    limits: MediaLimits | Mapping[str, float] | None = None,
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Load a model and its processor from a run folder, a checkpoint in one or an export, in eval mode.

    The digests of its files are checked first; `mllm.utils.sealing.unchecked` leaves that out.

    Args:
        dtype: of the frozen parts: "float32", "bfloat16" ("bf16"), "float16" ("fp16"), or torch's own.
        device: where to put the model; the GPU when left out, where there is one.
        checkpoint: of a run: the step, the folder's name, or "auto" for the newest; the finished model when left out.
        sources: where frozen parts are now, by part (llm, image, audio, video), if they were moved.
        merge_adapter: fold the LLM's adapter into its weights, see `merge_llm_adapter`.
        limits: pixels, seconds and bytes beyond which files are refused, e.g. `{"video_seconds": 600}`; those that are
            not named have the defaults of `mllm.media.MediaLimits`.

    Raises:
        FileNotFoundError: the folder holds no model or no such checkpoint, or a frozen part is not where it was.
        ValueError: weights that do not fit, by name, or frozen parts that are not those it was trained on; or an
            adapter that cannot be merged; or a device that is not here; or files that are not those written, by name.
    """
    register()
    allowed, device = MediaLimits.of(limits), _device_of(device)
    home = model_folder(folder, checkpoint)
    model, processor = _load(home, dtype=read_dtype(dtype), attention=attention, sources=sources)
    processor.limits = allowed
    if merge_adapter:
        merge_llm_adapter(model)
    model.to(device)  # pyright: ignore[reportArgumentType] (PreTrainedModel.to is wrapped without its types)
    return model, processor


def load_for(
    options: ModelOptions, *, device: str | torch.device | None = None
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Load the model that the options of a command name.

    Args:
        device: where to put the model; when left out the CPU where the options say so, and as in `load` otherwise.

    Raises:
        FileNotFoundError, ValueError: as `load`, or as `set_audio_padding`.
    """
    if options.untrained_padding and options.audio_padding == "trained":
        raise ValueError("untrained_padding is true; it goes with an audio_padding other than trained")
    with nullcontext() if options.verify else unchecked():
        model, processor = load(
            options.model,
            dtype=options.dtype,
            device="cpu" if device is None and options.use_cpu else device,
            merge_adapter=options.merge_adapter,
            checkpoint=options.checkpoint,
            sources=options.sources,
            limits=options.limits,
        )
    if options.audio_padding != "trained":
        set_audio_padding(model, processor, options.audio_padding, untrained_padding=options.untrained_padding)
    return model, processor


def _device_of(device: str | torch.device | None) -> torch.device:
    """Return the device that is meant; the GPU where none is named and there is one."""
    has_gpu = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; give one such as cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if named.type == "cuda" and (not has_gpu or (named.index or 0) >= count):
        raise ValueError(f"device is {device}, and PyTorch sees {count} GPUs here; leave it out, or name cpu")
    return named


@torch.no_grad()
def merge_llm_adapter(model: ElasticForConditionalGeneration) -> None:
    """Fold a LoRA, or a bank that has the shared one alone, into the LLM's weights in place; nothing where none is.

    Answers then cost what they cost the LLM alone. Weights in bfloat16 are rounded to it once more. The model can no
    longer be trained on or saved as a run.

    Raises:
        ValueError: an adapter that depends on the rows.
    """
    check_mergeable(model.config, "merge_adapter is true")
    adapter = model.config.adapter
    has_experts = isinstance(adapter, LoraBankConfig) and bool(adapter.scales or adapter.tasks)
    has_experts = has_experts or isinstance(adapter, GatedLoraConfig)
    if has_experts or isinstance(adapter, MomeConfig):
        experts = " with experts per scale or task" if has_experts else ""
        raise ValueError(f"merge_adapter is true, but an adapter of kind {adapter.kind}{experts} depends on the rows")
    select_experts(model.model.language_model, scale_id=None, task_id=None)
    merge_adapters(model.model.language_model)
    model.config.adapter = None


def check_mergeable(config: ElasticConfig, wish: str) -> None:
    """Refuse to fold an adapter into weights of 8 or 4 bits.

    Args:
        wish: what the user asked for.

    Raises:
        ValueError: the LLM is quantised.
    """
    if config.quantization is not None:
        raise ValueError(
            f"{wish}, but the LLM is kept as {config.quantization.kind}: sums would have to be rounded to its few "
            "bits again, and answers would change. The run folder serves as it is"
        )


def _load(
    folder: Path, *, dtype: torch.dtype, attention: str, sources: Mapping[str, str] | None
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    run = run_of(folder)
    home = folder if (folder / PROCESSOR).is_file() else run
    if not (home / PROCESSOR).is_file():
        raise FileNotFoundError(
            f"{home} holds no {PROCESSOR}, which a run writes when it begins; go on with it once (mllm train --resume "
            f"{NEWEST})"
        )
    check_before_load(folder)
    config = ElasticConfig.from_pretrained(folder)
    check_layer_counts(config.to_dict(), str(folder))
    processor = ElasticProcessor.from_pretrained(home, elastic_config=config, trust_remote_code=False)
    if not (folder / TRAINABLES).is_file():
        if read_experts(folder) is not None:
            raise ValueError(
                f"{folder} holds its experts as LoRA folders, for an engine that chooses one per request: mllm serve "
                "--engine vllm"
            )
        if sources:
            raise ValueError(f"sources is given, but {folder} is no run: an export holds all of its parts")
        implementation = {"text_config": known_attention(config.get_text_config(), attention)}
        exported = load_checked(
            ElasticForConditionalGeneration,
            str(folder),
            config,
            dtype=dtype,
            attn_implementation=implementation,
        )
        return cast(ElasticForConditionalGeneration, exported), processor
    config.sources = find_parts(config.sources or {}, run, sources)
    model = assemble(config, dtype=dtype, attention=attention)
    load_trainables(model, folder / TRAINABLES, set_trainables(model, tuple(config.trained_parts)))
    return model.eval(), processor
