"""Lists the families of hosts that are supported, and tells what follows from a host's config alone.

Knows `model_type`s, names of transformers' classes and attributes, and sizes in configs. Does not know weights.

Most families run their decoder on embeddings, a causal mask and positions in one dimension, and nothing else. What the
others want beside those stands with them in `HOSTS`; families that want what is not given yet are in `NOT_YET`.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm.budget.tiling import Tiling
from mllm.encoders import EncoderFacts
from mllm.hosts import clips, patches, tiles
from mllm.hosts.channels import Channels, Levels, PerLayerInputs, PrefixTypes, TokenTypes

Grid = tuple[int, int]


@dataclass(frozen=True)
class Images:
    """How a family sees images: every tile is a square of one size.

    Args:
        grid: rows and columns of the soft tokens of a tile, from the host's config.
        is_nested: whether its method takes the tiles of an image one dimension deeper.
        tiling: how the tiles of an image are put together as one map, from the host's config; None where they stay
            apart.
        reads_maps: the tiles of an image are one encoded item behind its thumbnail; see `mllm.hosts.maps`.
        shows_one: a prompt is about one image; several would be seen otherwise than one.
    """

    grid: Callable[[Any], Grid]
    is_nested: bool = False
    tiling: Callable[[Any], Tiling] | None = None
    reads_maps: bool = False
    shows_one: bool = False

    def num_positions(self, config: Any, num_features: int) -> int:
        """Count the patches that the encoder reads for one tile."""
        return tiles.num_patches(config)


@dataclass(frozen=True)
class Patches:
    """How a family sees images that keep their shape: as patches, some neighbours of which become a soft token.

    Args:
        inputs: what of its processor's output it reads, as the patches (P, D) of one image and the rows and columns of
            its soft tokens; with the host's config.
        features: its soft tokens (N, T, C), of its body, patches (N, P, D) and grids (N, 2).
        smallest: patches (1, P, D) and grid (1, 2) of the smallest image, from the host's config.
        merged: patches per soft token, from the host's config.
        has_breaks: its prompts have a token of text behind each row.
        grid_of: rows and columns of an image by its height and width, from the host's image processor and config; None
            where the image processor itself counts patches by the size.
    """

    inputs: Callable[[Mapping[str, Tensor], Any], tuple[Tensor, Grid]]
    features: Callable[[Any, Tensor, Tensor], Tensor]
    smallest: Callable[[Any], tuple[Tensor, Tensor]]
    merged: Callable[[Any], int]
    has_breaks: bool = False
    grid_of: Callable[[Any, Any, int, int], Grid] | None = None
    num_fixed: ClassVar[int] = 1

    def num_positions(self, config: Any, num_features: int) -> int:
        """Count the patches that the encoder reads for one image of so many soft tokens."""
        return num_features * self.merged(config)


@dataclass(frozen=True)
class Clips:
    """How a family hears clips.

    Args:
        frames_per_second: of its soft tokens, from the host's config and its feature extractor's values.
        inputs: what of its processor's output it reads, as the values of one clip and their true length.
        features: its soft tokens (N, T, H) and their counts (N,), of its body, values and lengths.
        smallest: values and length of the smallest clip, from the host's config.
        positions: counts what the encoder's layers read for a clip, from the host's config and its soft tokens.
        window_seconds: the longest clip that its processor keeps whole; None where any length will do.
        num_fixed: how many of the last dimensions of the values have one size in all clips.
        outputs: what stands for its processor's output, of the processor and the samples (L,) of a clip, where the
            processor takes no text with a placeholder in it.
        whole_seconds: clips are read in whole windows of so many seconds, with silence behind the last.
    """

    frames_per_second: float
    inputs: Callable[[Mapping[str, Tensor]], tuple[Tensor, int]]
    features: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    smallest: Callable[[Any], tuple[Tensor, Tensor]]
    positions: Callable[[Any, int], int]
    window_seconds: float | None = None
    num_fixed: int = 2
    outputs: Callable[[Any, np.ndarray], Mapping[str, Tensor]] | None = None
    whole_seconds: float | None = None

    def num_positions(self, config: Any, num_features: int) -> int:
        """Count the positions that the encoder reads for one clip of so many soft tokens."""
        return self.positions(config, num_features)

    def num_tokens(self, seconds: float) -> int:
        """Count the soft tokens of a clip that lasts so long, as nearly as that tells."""
        if self.whole_seconds is not None:
            seconds = math.ceil(seconds / self.whole_seconds) * self.whole_seconds
        return round(seconds * self.frames_per_second)


@dataclass(frozen=True)
class HostFamily:
    """What is known of one family.

    Args:
        model_class, processor_class: their names in transformers.
        decoder, encoder: the attributes of the body that hold the LLM, and what comes before the projector.
        merging: the attributes of the encoder that run once per soft token, as projectors do.
        unread: the attributes of the body that hold what reads other media.
        images, patches, clips: how it reads images in tiles, images that keep their shape, or audio.
        channels: what its decoder reads of a token beside its embedding.
        has_grid_positions: its positions have three dimensions; see `mllm.hosts.positions`.
        caps_logits: its head caps logits as its text config says.
        reads_whole: why prompts cannot be read in parts, which may then be shared, kept and joined; empty where they
            can.
        template: what makes prompts, where the host's processor does so itself and has no chat template.
        is_tekken: its tokenizer is a tekken file, and prompts are made by mistral-common; see `mllm.hosts.tekken`.
    """

    model_class: str
    processor_class: str
    decoder: str = "language_model"
    encoder: str = "vision_tower"
    merging: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    images: Images | None = None
    patches: Patches | None = None
    clips: Clips | None = None
    channels: Channels | None = None
    has_grid_positions: bool = False
    caps_logits: bool = False
    reads_whole: str = ""
    template: str | None = None
    is_tekken: bool = False

    @property
    def shares_beginnings(self) -> bool:
        """Whether prompts that begin alike can be read as far as that once."""
        return not self.reads_whole and (self.channels is None or self.channels.is_causal)

    @property
    def reads(self) -> Images | Patches | Clips:
        """Return how it reads its medium."""
        reads = self.images or self.patches or self.clips
        assert reads is not None
        return reads

    @property
    def medium(self) -> Literal["image", "audio"]:
        """Return the medium that it reads."""
        return "audio" if self.clips is not None else "image"


_GRIDS = partial(
    HostFamily,
    encoder="visual",
    merging=("merger",),
    patches=Patches(patches.merged_inputs, patches.merged_features, patches.merged_smallest, patches.num_merged),
    has_grid_positions=True,
)
"""What the Qwens and GLM-4V have in common: squares of patches are merged, and positions are those of a grid."""
_QWEN3_VL = partial(
    _GRIDS, processor_class="Qwen3VLProcessor", merging=("merger", "deepstack_merger_list"), channels=Levels()
)
_QWEN3_5 = partial(
    _GRIDS,
    processor_class="Qwen3VLProcessor",
    reads_whole="its layers of linear attention keep one state of all they have read",
)

_GEMMA_BREAK = 108
"""The id of a line break in all vocabularies of Gemma 1 and 2."""
_ONE_QUESTION = (
    "{% set parts = messages[0].content %}{% set images = parts | selectattr('type', 'equalto', 'image') | list %}"
    "{% if messages[0].role != 'user' or messages | length > 2 or not images %}"
    "{{ raise_exception('it takes one question about an image, and one answer') }}{% endif %}"
    "{% for part in images %}<image>{% endfor %}{{ bos_token }}"
    "{% for part in parts %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '\n' }}"
    "{% for message in messages[1:] %}{% for part in message.content %}{{ part.text }}{% endfor %}{{ eos_token }}"
    "{% endfor %}"
)
"""What PaliGemma's processor makes of a text and images, and of the text that is to follow."""

HOSTS: dict[str, HostFamily] = {
    "llava": HostFamily("LlavaForConditionalGeneration", "LlavaProcessor", images=Images(tiles.llava_grid)),
    "internvl": HostFamily("InternVLForConditionalGeneration", "InternVLProcessor", images=Images(tiles.internvl_grid)),
    "idefics3": HostFamily(
        "Idefics3ForConditionalGeneration",
        "Idefics3Processor",
        decoder="text_model",
        encoder="vision_model",
        images=Images(tiles.idefics_grid, is_nested=True),
    ),
    "smolvlm": HostFamily(
        "SmolVLMForConditionalGeneration",
        "SmolVLMProcessor",
        decoder="text_model",
        encoder="vision_model",
        images=Images(tiles.idefics_grid, is_nested=True),
    ),
    "aya_vision": HostFamily(
        "AyaVisionForConditionalGeneration", "AyaVisionProcessor", images=Images(tiles.downsampled_grid)
    ),
    "cohere2_vision": HostFamily(
        "Cohere2VisionForConditionalGeneration", "Cohere2VisionProcessor", images=Images(tiles.downsampled_grid)
    ),
    "qwen2_vl": _GRIDS("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2_5_vl": _GRIDS("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "qwen3_vl": _QWEN3_VL("Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": _QWEN3_VL("Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": _QWEN3_5("Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": _QWEN3_5("Qwen3_5MoeForConditionalGeneration"),
    "glm4v": _GRIDS("Glm4vForConditionalGeneration", "Glm4vProcessor"),
    "glm4v_moe": _GRIDS("Glm4vMoeForConditionalGeneration", "Glm4vProcessor"),
    "gemma3": HostFamily(
        "Gemma3ForConditionalGeneration",
        "Gemma3Processor",
        images=Images(tiles.gemma3_grid),
        channels=TokenTypes("token_type_ids"),
    ),
    "paligemma": HostFamily(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaProcessor",
        images=Images(tiles.patch_grid),
        channels=PrefixTypes("token_type_ids", break_id=_GEMMA_BREAK),
        caps_logits=True,
        reads_whole="it reads a question in both directions, up to its last token",
        template=_ONE_QUESTION,
    ),
    "gemma4": HostFamily(
        "Gemma4ForConditionalGeneration",
        "Gemma4Processor",
        unread=("audio_tower", "embed_audio"),
        patches=Patches(
            patches.padded_inputs,
            patches.padded_features,
            patches.padded_smallest,
            patches.num_pooled,
            grid_of=patches.padded_grid,
        ),
        channels=PerLayerInputs("mm_token_type_ids"),
        caps_logits=True,
    ),
    "llava_next": HostFamily(
        "LlavaNextForConditionalGeneration",
        "LlavaNextProcessor",
        images=Images(tiles.llava_grid, tiling=tiles.pinpoint_tiling),
    ),
    "llava_onevision": HostFamily(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionProcessor",
        images=Images(tiles.llava_grid, tiling=tiles.scaled_tiling, reads_maps=True, shows_one=True),
    ),
    "mistral3": HostFamily(
        "Mistral3ForConditionalGeneration",
        "PixtralProcessor",
        patches=Patches(
            patches.cell_inputs,
            patches.cell_features,
            patches.cell_smallest,
            patches.num_in_cell,
            has_breaks=True,
            grid_of=patches.cell_grid,
        ),
    ),
    "qwen2_audio": HostFamily(
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioProcessor",
        encoder="audio_tower",
        clips=Clips(
            25.0,
            clips.qwen2_audio_inputs,
            clips.qwen2_audio_features,
            clips.mel_window,
            clips.window_positions,
            window_seconds=30.0,
        ),
    ),
    "granite_speech": HostFamily(
        "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechProcessor",
        encoder="encoder",
        clips=Clips(
            10.0,
            clips.granite_inputs,
            clips.granite_features,
            clips.granite_window,
            clips.granite_positions,
            num_fixed=1,
        ),
    ),
    "glmasr": HostFamily(
        "GlmAsrForConditionalGeneration",
        "GlmAsrProcessor",
        encoder="audio_tower",
        clips=Clips(
            12.5,
            clips.glmasr_inputs,
            clips.glmasr_features,
            clips.glmasr_window,
            clips.glmasr_positions,
            window_seconds=655.0,
        ),
    ),
    "voxtral": HostFamily(
        "VoxtralForConditionalGeneration",
        "VoxtralProcessor",
        encoder="audio_tower",
        clips=Clips(
            clips.VOXTRAL_TOKENS_PER_SECOND,
            clips.voxtral_inputs,
            clips.voxtral_features,
            clips.voxtral_window,
            clips.voxtral_positions,
            outputs=clips.voxtral_outputs,
            whole_seconds=clips.VOXTRAL_WINDOW_SECONDS,
        ),
        is_tekken=True,
    ),
}
"""By the `model_type` of the host's config."""

_TYPICAL_SIDE = 16
"""Rows and columns of an image that reports are about, where images keep their shape."""
NOT_YET: dict[str, str] = {
    "qwen2_5_omni": "it reads several media at once",
}
"""Families that are known and refused, each with the reason."""


def find_family(model_type: str, *, reference: str) -> HostFamily:
    """Find the family of a host.

    Args:
        reference: the folder or name of the host as a user types it; for the message.

    Raises:
        ValueError: one that is not supported; those that are, are named.
    """
    if model_type in HOSTS:
        return HOSTS[model_type]
    why = f" ({NOT_YET[model_type]})" if model_type in NOT_YET else ""
    raise ValueError(
        f"{reference} is a {model_type}, which is not supported yet as model.host{why}; allowed: {', '.join(HOSTS)}"
    )


def host_class(config: Any) -> type[PreTrainedModel]:
    """Return the class of a host, with its head."""
    return getattr(transformers, find_family(config.model_type, reference="the host").model_class)


def build_host(config: Any) -> Any:
    """Make a host with random weights; works on the meta device."""
    return host_class(config)._from_config(copy.deepcopy(config))


def reading_parts(body: Any) -> tuple[nn.Module, list[nn.Module]]:
    """Return the encoder of a host's body, and what runs once per soft token: its projectors, some in the encoder."""
    family = find_family(body.config.model_type, reference="the host")
    encoder = getattr(body, family.encoder)
    known = (family.decoder, family.encoder, *family.unread)
    projectors = [part for name, part in body.named_children() if name not in known]
    return encoder, projectors + [getattr(encoder, name) for name in family.merging]


def placeholder_id(config: Any, medium: str) -> int:
    """Return the id that stands once per soft token in the prompts of a host."""
    values = [getattr(config, f"{medium}_token_{name}", None) for name in ("id", "index")]
    return int(next(value for value in values if value is not None))


def host_tiling(config: Any) -> Tiling | None:
    """Return how a host puts the tiles of an image together; None where they stay apart, or there are none."""
    images = find_family(config.model_type, reference="the host").images
    return None if images is None or images.tiling is None else images.tiling(config)


def host_facts(config: Any) -> EncoderFacts:
    """Return what the encoder of a host publishes: soft tokens as wide as its LLM.

    Raises:
        ValueError: a host of another family, or one whose images have no square grid.
    """
    family = find_family(config.model_type, reference="the host")
    size = int(config.get_text_config().hidden_size)
    if family.patches is not None:
        levels = family.channels.num_levels(config) if family.channels is not None else 0
        most = _TYPICAL_SIDE * _TYPICAL_SIDE
        return EncoderFacts("image", size * (1 + levels), grid=(_TYPICAL_SIDE, _TYPICAL_SIDE), max_patches=most)
    if family.images is not None:
        side = tiles.image_side(config)
        return EncoderFacts("image", size, grid=family.images.grid(config), image_pixels=(side, side))
    assert family.clips is not None
    return EncoderFacts("audio", size, frames_per_second=family.clips.frames_per_second)
