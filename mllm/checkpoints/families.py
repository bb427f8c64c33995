"""Say where the checkpoints on hubs hold an LLM or an encoder, family by family: reviewed lists of names.

Knows names alone. Does not know files, shapes or models.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Says where the checkpoints of one kind hold a part.

    Args:
        renamed: beginnings of names in the file and what replaces them in the part; the first that fits counts.
        beside: beginnings of the names of other parts, which are left alone.
        unread: tensors of the part that no forward pass here reads; they may be missing, or be there for nothing.
    """

    renamed: tuple[tuple[str, str], ...] = (("", ""),)
    beside: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def name_in_part(self, name: str) -> str | None:
        """Return the name in the part of a name in the file; None for another part's."""
        if name.startswith(self.beside):
            return None
        for start, replaced in self.renamed:
            if name.startswith(start):
                return replaced + name.removeprefix(start)
        return name


# Heads of transformers' speech classes: CTC, classification, speaker vectors, and what only pre-training has.
_WAVE_HEADS = (
    *("lm_head.", "classifier.", "projector.", "layer_weights", "objective.", "tdnn."),
    *("feature_extractor.weight", "feature_extractor.bias", "quantizer.", "project_hid.", "project_q."),
)


def _wave(prefix: str) -> Layout:
    return Layout(((f"{prefix}.", ""), ("", "")), _WAVE_HEADS, unread=("masked_spec_embed",))


_TWO_ENCODERS = Layout(
    (("vision_model.", ""), ("", "")),
    beside=("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "classifier."),
)
_MASK_TOKEN = ("embeddings.mask_token",)
# VLMs are saved under these names without `model.` today, as in the oldest files, and were saved with it in between.
_CONNECTORS = ("multi_modal_projector.", "model.multi_modal_projector.", "image_newline", "model.image_newline")
_VLM_ENCODER = Layout(
    tuple(
        (f"{start}{inner}", "") for inner in ("vision_model.", "") for start in ("model.vision_tower.", "vision_tower.")
    ),
    beside=("language_model.", "model.language_model.", "lm_head.", *_CONNECTORS),
)
_VLM_LLM = Layout(
    (
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.model.", "model."),
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
    ),
    beside=("vision_tower.", "model.vision_tower.", *_CONNECTORS),
)

ENCODER_LAYOUTS: dict[str, Layout] = {
    "whisper": Layout(
        (("model.encoder.", ""), ("encoder.", ""), ("", "")),
        beside=("model.decoder.", "decoder.", "proj_out.", "projector.", "classifier.", "layer_weights"),
    ),
    "hubert": _wave("hubert"),
    "wav2vec2": _wave("wav2vec2"),
    "wavlm": _wave("wavlm"),
    "clip": _TWO_ENCODERS,
    "clip_vision_model": _TWO_ENCODERS,
    "siglip": _TWO_ENCODERS,
    "siglip_vision_model": _TWO_ENCODERS,
    "siglip2": _TWO_ENCODERS,
    "siglip2_vision_model": _TWO_ENCODERS,
    "dinov2": Layout((("dinov2.", ""), ("", "")), ("classifier.",), _MASK_TOKEN),
    "dinov2_with_registers": Layout((("dinov2_with_registers.", ""), ("", "")), ("classifier.",), _MASK_TOKEN),
    "dinov3_vit": Layout(unread=_MASK_TOKEN),
    "av_hubert": Layout(),
    "llava": _VLM_ENCODER,
    "llava_next": _VLM_ENCODER,
    "gemma3": _VLM_ENCODER,
}
"""Reviewed, by the `model_type` of the folder: how an encoder lies in its checkpoints."""

WHOLE_VLMS: dict[str, Layout] = {"llava": _VLM_LLM, "llava_next": _VLM_LLM, "gemma3": _VLM_LLM}
"""Reviewed, by the `model_type` of the folder: how the LLM lies in checkpoints of larger models."""
