"""Converts AV-HuBERT as its authors released it (fairseq), pre-trained or fine-tuned, to the encoder of this project.

Knows the names in the released files. Does not know how the file was read, or what the encoder is used for.
Source: Shi et al., AV-HuBERT (arXiv 2201.02184), facebookresearch/av_hubert.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mllm.checkpoints.tensor_files import write_model
from mllm.convert.restricted import StoredTensor, plain, read_checkpoint, read_tensors
from mllm.encoders.av_hubert import AVHubertConfig, AVHubertEncoder

FINE_TUNED_PREFIX = "encoder.w2v_model."
# What pre-training and the decoders of fine-tuned models need and an encoder does not.
DROPPED = ("mask_emb", "label_embs_concat", "final_proj.", "decoder.", "encoder.proj.")
RENAMED = (
    (r"^encoder\.pos_conv\.0\.bias$", "encoder.pos_conv_embed.conv.bias"),
    (r"^encoder\.pos_conv\.0\.weight_g$", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"^encoder\.pos_conv\.0\.weight_v$", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.layer_norm."),
    (r"^(encoder\.layers\.\d+)\.fc1\.", r"\1.feed_forward.intermediate_dense."),
    (r"^(encoder\.layers\.\d+)\.fc2\.", r"\1.feed_forward.output_dense."),
)
# What shapes cannot tell, by the name in the file's configuration.
NEEDED = ("encoder_attention_heads", "layer_norm_first")
# The encoder can do these one way; a file that says otherwise is refused.
EXPECTED = {"modality_fuse": "concat", "resnet_relu_type": "prelu", "sub_encoder_layers": 0}


@dataclass(frozen=True)
class Converted:
    """An encoder, and which entries of the file it has no use for."""

    encoder: AVHubertEncoder
    is_fine_tuned: bool
    dropped: list[str] = field(default_factory=list)


def convert_file(path: str | Path) -> Converted:
    """Read a released `.pt` file; nothing in it is run.

    Raises:
        ValueError: no such checkpoint, or one this encoder cannot hold; the key is named.
    """
    content = read_checkpoint(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} holds no 'model'; it is no checkpoint of AV-HuBERT")
    stored = {key: entry for key, entry in content["model"].items() if isinstance(entry, StoredTensor)}
    settings = model_settings(plain(content.get("cfg")) or {}, plain(content.get("args")) or {})
    tensors = read_tensors({key: entry for key, entry in stored.items() if not _is_dropped(key)})
    return convert_state(tensors, settings, stored)


def convert_state(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], entries: Mapping[str, Any] | None = None
) -> Converted:
    """Convert a state dict with released names to an encoder.

    Args:
        state: the tensors by name.
        settings: what shapes do not tell, see `NEEDED` and `EXPECTED`.
        entries: all names of the file where `state` leaves some out.

    Raises:
        ValueError: a setting that is missing or not supported, or an entry that is missing, unknown or misshapen.
    """
    names = list(entries or state)
    is_fine_tuned = any(name.startswith(FINE_TUNED_PREFIX) for name in names)
    weights = {_name_here(name): value for name, value in state.items() if not _is_dropped(name)}
    if missing := [key for key in NEEDED if key not in settings]:
        raise ValueError(f"the configuration in the file does not tell {missing[0]}")
    for key, only in EXPECTED.items():
        if settings.get(key, only) != only:
            raise ValueError(f"{key} is {settings[key]!r} in the file; only {only!r} can be converted")
    encoder = AVHubertEncoder(config_of(weights, settings)).eval()
    expected = encoder.state_dict()
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    for problem, entries_wrong in (("misses", missing), ("holds unknown", unknown)):
        if entries_wrong:
            shown = ", ".join(sorted(entries_wrong)[:3])
            raise ValueError(f"the checkpoint {problem} {shown} ({len(entries_wrong)} in all)")
    if wrong := [name for name, value in weights.items() if value.shape != expected[name].shape]:
        shapes = tuple(weights[wrong[0]].shape), tuple(expected[wrong[0]].shape)
        raise ValueError(f"{wrong[0]} has the shape {shapes[0]} in the checkpoint; expected {shapes[1]}")
    encoder.load_state_dict(dict(weights))
    return Converted(encoder, is_fine_tuned, sorted(name for name in names if _is_dropped(name)))


def config_of(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> AVHubertConfig:
    """Read sizes from the shapes of entries (by their names here), the rest from the file's configuration.

    Raises:
        ValueError: an entry that tells a size is missing or has too few axes, or sizes that do not go together.
    """
    try:
        hidden_size = _size(state, "post_extract_proj.weight", 0)
        kernel = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
        trunk = "feature_extractor_video.resnet.trunk.layer"
        return AVHubertConfig(
            hidden_size=hidden_size,
            num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")}),
            num_attention_heads=int(settings["encoder_attention_heads"]),
            intermediate_size=_size(state, "encoder.layers.0.feed_forward.intermediate_dense.weight", 0),
            resnet_channels=[_size(state, f"{trunk}{stage}.0.conv1.weight", 0) for stage in range(1, 5)],
            audio_feature_size=_size(state, "feature_extractor_audio.proj.weight", 1),
            num_conv_pos_embeddings=_size(state, kernel, 2),
            num_conv_pos_embedding_groups=max(hidden_size // _size(state, kernel, 1), 1),
            do_stable_layer_norm=bool(settings["layer_norm_first"]),
        )
    except KeyError as error:
        raise ValueError(f"the checkpoint misses {error.args[0]}; it is no AV-HuBERT") from error
    except StrictDataclassError as error:
        raise ValueError(f"the sizes in the checkpoint are those of no AV-HuBERT: {error}") from error


def _size(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    shape = tuple(state[name].shape)
    if len(shape) <= axis or not shape[axis]:
        raise ValueError(f"{name} has the shape {shape} in the checkpoint; it should have {axis + 1} axes or more")
    return shape[axis]


def model_settings(*configurations: Any) -> dict[str, Any]:
    """Find the settings of the encoder, wherever a released file keeps them: they stand beside
    `encoder_attention_heads`."""
    for configuration in configurations:
        if isinstance(configuration, Mapping):
            if NEEDED[0] in configuration:
                return dict(configuration)
            if settings := model_settings(*configuration.values()):
                return settings
    return {}


def _is_dropped(name: str) -> bool:
    name = name.removeprefix(FINE_TUNED_PREFIX)
    return name.startswith(DROPPED)


def _name_here(name: str) -> str:
    name = name.removeprefix(FINE_TUNED_PREFIX)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def save(converted: Converted, out: str | Path) -> None:
    """Write config.json and safetensors; `encoder: OUT` in a run config then reads lips with them."""
    encoder: Any = converted.encoder  # its type stubs do not know `to`
    write_model(encoder.to(torch.float32), out)
