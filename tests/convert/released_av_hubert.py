"""Names an encoder's entries as the released files of AV-HuBERT do."""

import torch
from torch import Tensor

from mllm.convert.av_hubert import RENAMED
from mllm.encoders.av_hubert import AVHubertEncoder

# How the released files call what `RENAMED` renames.
BACK = (
    ("encoder.pos_conv_embed.conv.bias", "encoder.pos_conv.0.bias"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "encoder.pos_conv.0.weight_g"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.pos_conv.0.weight_v"),
    (".attention.", ".self_attn."),
    (".feed_forward.intermediate_dense.", ".fc1."),
    (".feed_forward.output_dense.", ".fc2."),
)


def released(encoder: AVHubertEncoder, prefix: str = "") -> dict[str, Tensor]:
    """The state of an encoder under the names of a released file, with what pre-training leaves in it."""
    state = {}
    for name, value in encoder.state_dict().items():
        for ours, theirs in BACK:
            name = name.replace(ours, theirs)
        if name.startswith("encoder.layers."):
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
        state[prefix + name] = value
    assert len(RENAMED) == len(BACK) + 1
    return state | {f"{prefix}mask_emb": torch.zeros(8)}
