"""What a user writes to describe a model: the `model` block of a run config.

Plain dataclasses, read from YAML and the command line. Knows no torch, so that `--help` is quick.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal


def check_at_least(settings: object, keys: Iterable[str], least: float = 1, *, prefix: str = "") -> None:
    """Refuse numbers of a dataclass that are too small; None is none.

    Args:
        prefix: where the dataclass stands in its config, such as "data.".

    Raises:
        ValueError: the first of the keys whose value is.
    """
    for key in keys:
        value = getattr(settings, key)
        if value is not None and value < least:
            raise ValueError(f"{prefix}{key} is {value}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class EncoderAdapterConfig:
    """LoRA inside an encoder whose own weights stay frozen."""

    rank: int = 64
    """The inner size itself."""
    alpha: float = 128.0
    """The update is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Last parts of the names of the linear layers that get one."""


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """Images of any resolution: cut into tiles that are each encoded; see docs/vision_inputs.md."""

    kind: Literal["pinpoints", "free"] = "pinpoints"
    """The sizes listed, or every rows x columns of at most max_tiles tiles."""
    pinpoints: list[list[int]] = field(default_factory=list)
    """Sizes [height, width] in pixels, each of whole tiles; LLaVA-NeXT's five shapes when left out."""
    max_tiles: int | None = None
    """Most tiles of an image; needed by free."""
    thumbnail: bool = True
    """Show the whole image first, squeezed into one tile."""
    merge: Literal["spatial_unpad", "flat"] = "spatial_unpad"
    """One map of all tiles without what lies over padding (LLaVA-NeXT), or the tiles one after the other."""
    newline: bool = True
    """A learned token at the end of each row of the map, or of tiles when flat."""


FRAMES_ENCODER = "image"
"""What `video.encoder` says where frames go through the tower, the compressor and the projector of images."""


@dataclass(frozen=True, kw_only=True)
class MediumConfig:
    """How one medium becomes soft tokens."""

    encoder: str
    """Folder, hub name or synthetic part of the encoder; of videos also `image`: sampled frames, each like an image."""
    compressor: Literal["pool", "query", "stack", "hybrid"] = "pool"
    """Average pooling, Matryoshka queries, frames stacked on the feature axis, or for images a pooled map and nested
    queries (after PARCEL)."""
    budgets: list[str | int] = field(default_factory=list)
    """The trained space, e.g. [1, 4, 16, 64] tokens or ["/4", "/16"] frames per token."""
    budget_range: list[int] | None = None
    """Instead of budgets: [start, stop, step] of counts, stop included."""
    feature_layer: int | None = None
    """Which hidden layer of a vision tower gives the features; -2 by default, -1 is the last."""
    final_norm: bool | None = None
    """Send that layer through the tower's own final norm; off by default."""
    image_size: list[int] | None = None
    """[height, width] in pixels that images are brought to; what the tower was trained on by default."""
    max_num_patches: int | None = None
    """SigLIP 2 with native aspect ratio: most patches of an image; what the tower was trained on by default."""
    num_queries: int | None = None
    """Queries of the compressor `query` (per window on a stream); the largest count by default."""
    anchors: list[int] | None = None
    """Sizes of the pooled map of the compressor `hybrid`, beside 1; by default 16 and 64 where the largest budget is
    above them."""
    window_frames: int | None = None
    """Window of the compressor `query` on a stream, in encoder frames."""
    keys: Literal["position", "content"] | None = None
    """What the queries look at: positions only (MQT as released, the default) or the features too."""
    query_size: int | None = None
    """Size of the queries; the encoder's hidden size by default."""
    query_heads: int | None = None
    """Attention heads of the compressors `query` and `hybrid`; one per 64 of their size by default."""
    query_start: Literal["released", "pyramid"] | None = None
    """Where fresh queries on images begin: everywhere alike (MQT as released, the default), or each at its own cell,
    coarse to fine; needs keys: position."""
    projector_size: int | None = None
    """Hidden size of the two-layer projector, the LLM's by default; 0 for one linear layer."""
    projector_norm: bool | None = None
    """LayerNorm after the projector; none by default."""
    projector_activation: Literal["gelu", "relu"] | None = None
    """Between the projector's layers; gelu by default."""
    projector_experts: int | None = None
    """A mixture of so many projectors with a router (Llama-SMoP); one projector and no router by default."""
    projector_top_k: int | None = None
    """How many of them a soft token uses; 2 by default."""
    projector_balance_weight: float | None = None
    """Weight of the loss that keeps them in use; 0.01 by default."""
    projector_z_weight: float | None = None
    """Weight of the loss that keeps the router's logits small; 0.001 by default."""
    per_budget_projector: bool = False
    """One projector per trained budget (Llama-MTSK, Omni-AVSR) instead of a shared one; between them is refused."""
    project_first: bool | None = None
    """Pool after the projector, as M3 does."""
    order: Literal["raster", "haar"] | None = None
    """Order of an image's tokens under `pool`: in reading order (the default), or coarse to fine (`haar`), where the
    tokens of a small budget are the first ones of a large; then counts are those of whole maps: 9, 36, 144, 576."""
    encoder_adapter: EncoderAdapterConfig | None = None
    """LoRA inside the encoder, as Omni-AVSR has it in AV-HuBERT; it learns with the adapter. None by default."""
    span: list[str] = field(default_factory=list)
    """Tokens before and after the medium's run, e.g. ["<audio>", "</audio>"]; nothing by default. Those that the LLM's
    tokenizer does not know get embedding rows of their own, which learn with the compressors."""
    released_cut: bool | None = None
    """Whisper: as many frames as the released AVSR code cuts out, `max(int(samples / 16000 * 50), 25)`; set by
    `released_behaviour`. By default the whole frames of the clip."""
    normalize_audio: bool = False
    """Zero mean and unit variance per clip before the features, as the AVSR papers do."""
    tiling: TilingConfig | None = None
    """Images: cut into tiles; each image is squeezed into one when left out."""
    frames: int | None = None
    """Videos of images: most frames taken from a file; 8 by default."""
    frame_counts: list[int] | None = None
    """Videos of images: the trained numbers of frames shown, each a divisor of frames; all of them by default."""
    sampling: Literal["uniform", "fps"] | None = None
    """Videos of images: frames evenly over the whole clip (the default), or sample_fps of them a second as long as
    that gives no more than frames, and evenly otherwise."""
    sample_fps: float | None = None
    """Videos of images: frames per second of the sampling fps."""
    pad_to_square: bool = False
    """Images: margins in the mean colour make them square, as in LLaVA-1.5's second stage, MQT-LLaVA and M3. By
    default the encoder's own processor decides (CLIP's cuts the middle out)."""
    size_pixels: int | None = None
    """Lip videos: the shorter side is first brought to this many pixels; left as it is when left out."""
    crop_pixels: int = 88
    """Lip videos: side of the square cut from the middle of each frame."""

    def __post_init__(self) -> None:
        if bool(self.budgets) == bool(self.budget_range):
            raise ValueError("give either budgets or budget_range for a medium, and not both")
        if self.budget_range and len(self.budget_range) != 3:
            raise ValueError(f"budget_range is [start, stop, step], got {self.budget_range}")
        for key in ("projector_balance_weight", "projector_z_weight"):
            if (getattr(self, key) or 0.0) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it cannot be negative")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"image_size is [height, width] in pixels, got {self.image_size}")
        if len(self.span) not in (0, 2):
            raise ValueError(f"span is the token before and the token after, got {self.span}")


_LORA = {"rank": 16, "alpha": 32.0, "targets": ["q_proj", "v_proj"]}
ADAPTER_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {**_LORA, "dropout": 0.0},
    "lora_bank": {**_LORA, "variant": None, "scales": [], "tasks": []},
    "mome": {
        "placement": "layer",
        "num_experts": 23,
        "num_shared": 1,
        "top_k": 4,
        "bottleneck": 12,
        "renormalise": False,
        "balance_weight": 0.01,
        "disjoint_routers": False,
        "scales": [],
    },
}
"""The keys that go with a kind of adapter, and their defaults."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained inside the frozen LLM."""

    kind: Literal["lora", "lora_bank", "mome"] = "lora"
    """LoRA by PEFT, a bank of LoRAs (a shared one, one per scale, one per task), or a mixture of experts (MoME)."""
    rank: int | None = None
    """LoRA and bank: the inner size itself; 16 by default."""
    alpha: float | None = None
    """LoRA and bank: the update is scaled by alpha / rank; 32 by default."""
    targets: list[str] | None = None
    """LoRA and bank: last parts of the names of the linear layers that get one; q_proj and v_proj by default."""
    dropout: float | None = None
    """LoRA: dropout before the adapter; none by default."""
    variant: Literal["ms", "ss", "mss", "s", "t", "st"] | None = None
    """Bank: one shared (ms, s), one per scale (ss) or task (t), or a shared one beside those (mss, st)."""
    scales: list[str] | None = None
    """Bank with scales, MoME with disjoint routers: those trained, e.g. ["audio=/4,video=/2"]; by default every
    combination of the budgets."""
    tasks: list[str] | None = None
    """Bank with tasks: names of samples' tasks, or asr, vsr and avsr by media held, the default."""
    placement: Literal["attention", "ffn", "layer"] | None = None
    """MoME: the block the experts stand beside; layer by default."""
    num_experts: int | None = None
    """MoME: routed experts; 23 by default."""
    num_shared: int | None = None
    """MoME: experts that every token uses; 1 by default."""
    top_k: int | None = None
    """MoME: routed experts a token uses; 4 by default."""
    bottleneck: int | None = None
    """MoME: width of an expert; 12 by default."""
    renormalise: bool | None = None
    """MoME: let the gates of the experts a token uses sum to 1; not by default."""
    balance_weight: float | None = None
    """MoME: weight of the loss that keeps experts in use; 0.01 by default."""
    disjoint_routers: bool | None = None
    """MoME: a router per scale instead of one for all."""

    def __post_init__(self) -> None:
        own = ADAPTER_DEFAULTS[self.kind]
        for key in vars(self):
            if key not in ("kind", *own) and getattr(self, key) is not None:
                raise ValueError(f"adapter.{key} does not go with kind {self.kind}; allowed: {', '.join(own)}")
        if "variant" in own and self.variant is None:
            raise ValueError(f"adapter.variant is missing; kind {self.kind} needs one")

    @property
    def values(self) -> dict[str, Any]:
        """The kind and every key that goes with it, with its default where it was left out."""
        own = ADAPTER_DEFAULTS[self.kind]
        given = {key: value for key in own if (value := getattr(self, key)) is not None}
        return {"kind": self.kind, **own, **given}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The parts of a model and where they come from."""

    llm: str
    """Folder, hub name or synthetic part of the LLM with its tokenizer."""
    chat_format: Literal["plain", "llava_plain", "avsr", "vicuna_v1", "chat"] = "chat"
    """How a conversation becomes text; `chat` is the LLM's own template, llava_plain that of LLaVA's first stage."""
    released_behaviour: bool = False
    """Compute batches as the released code of Llama-AVSR, Llama-MTSK and Omni-AVSR does: every clip is as long as the
    longest of its batch, nothing is masked, and sound has their number of frames. Needs chat_format avsr."""
    names_images: bool = False
    """Say "image 1 is" before the first image of a conversation and so on (MMICL), so that questions name them."""
    image: MediumConfig | None = None
    """Images; not taken when left out."""
    audio: MediumConfig | None = None
    """Audio clips; not taken when left out."""
    video: MediumConfig | None = None
    """Lip videos, or with the encoder `image` videos of anything; not taken when left out."""
    adapter: AdapterConfig | None = None
    """Nothing inside the LLM is trained when left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen parts; what trains is kept in float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation of the LLM."""
    seed: int = 0
    """Of the initial values of compressors and adapter."""

    def __post_init__(self) -> None:
        if self.released_behaviour and self.chat_format != "avsr":
            raise ValueError(f"released_behaviour needs chat_format avsr, the released layout; got {self.chat_format}")
        for medium in ("audio", "video"):
            if (own := getattr(self, medium)) is not None and own.pad_to_square:
                raise ValueError(f"model.{medium}.pad_to_square is set, but only images (image) can be padded")
        if self.names_images and self.image is None:
            raise ValueError("names_images is set, but there is no image block")
        if self.shows_frames and self.image is None:
            raise ValueError("video.encoder is image, so frames are encoded like images; give an image block as well")
        for medium, own in self.media.items():
            if medium != "video" or own.encoder != FRAMES_ENCODER:
                _refuse(own, medium, FRAME_SETTINGS, "goes with a video block whose encoder is image")
            else:
                _check_frames(own)

    @property
    def encoded_media(self) -> dict[str, MediumConfig]:
        """Settings of the media that have an encoder of their own."""
        return {m: own for m, own in self.media.items() if not (m == "video" and self.shows_frames)}

    @property
    def shows_frames(self) -> bool:
        """Whether videos are frames that are encoded like images."""
        return self.video is not None and self.video.encoder == FRAMES_ENCODER

    @property
    def media(self) -> dict[str, MediumConfig]:
        """Settings by medium, for the media this model takes."""
        audio = self.audio
        if audio is not None and self.released_behaviour:
            audio = replace(audio, released_cut=True)
        every = {"image": self.image, "audio": audio, "video": self.video}
        return {medium: settings for medium, settings in every.items() if settings is not None}

    @property
    def sources(self) -> dict[str, str]:
        """Where the frozen parts come from: `llm` and the media that have an encoder of their own."""
        return {"llm": self.llm, **{medium: own.encoder for medium, own in self.encoded_media.items()}}

    def with_sources(self, sources: Mapping[str, str]) -> "ModelConfig":
        """Return the same model with some frozen parts, `llm` or media, read from elsewhere.

        Raises:
            ValueError: a part that it has not.
        """
        check_parts(sources, self.sources)
        media = {m: replace(getattr(self, m), encoder=place) for m, place in sources.items() if m != "llm"}
        return replace(self, llm=sources.get("llm", self.llm), **media)

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, in the LLM or in an encoder."""
        return self.adapter is not None or any(own.encoder_adapter is not None for own in self.media.values())


FRAME_SETTINGS = ("frames", "frame_counts", "sampling", "sample_fps")
"""The keys of a video block whose frames are encoded like images, beside encoder, budgets and span."""


def _refuse(own: MediumConfig, medium: str, keys: Iterable[str], why: str) -> None:
    """Raises: ValueError for the first of the keys that is not at its default."""
    defaults = {item.name: item.default for item in fields(MediumConfig)}
    for key in keys:
        if getattr(own, key) != defaults[key]:
            raise ValueError(f"{medium}.{key} is {getattr(own, key)!r}; it {why}")


def _check_frames(own: MediumConfig) -> None:
    """Refuse what contradicts a video of images: everything else is taken from the image block."""
    allowed = {"encoder", "budgets", "budget_range", "span", *FRAME_SETTINGS}
    others = (item.name for item in fields(MediumConfig) if item.name not in allowed)
    _refuse(own, "video", others, "is taken from the image block where video.encoder is image; leave it out")
    frames = 8 if own.frames is None else own.frames
    if frames < 1:
        raise ValueError(f"video.frames is {frames}; it must be at least 1")
    if (own.sampling == "fps") != (own.sample_fps is not None) or (own.sample_fps or 1) <= 0:
        raise ValueError(
            f"video.sample_fps is {own.sample_fps}; a number above 0 goes with sampling fps and only with it"
        )
    if wrong := [count for count in own.frame_counts or () if count < 1 or frames % count]:
        divisors = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
        raise ValueError(
            f"video.frame_counts holds {wrong[0]}; allowed are the divisors of {frames} frames: {divisors}"
        )


def check_parts(given: Iterable[str], parts: Iterable[str]) -> None:
    """Refuse a source for a frozen part that a model has not.

    Args:
        given: the parts that a user names.
        parts: those of the model.

    Raises:
        ValueError: the first of them that it has not.
    """
    own = sorted(parts)
    if unknown := sorted(set(given) - set(own)):
        raise ValueError(f"sources names {unknown[0]!r}; the frozen parts of this model are {', '.join(own)}")
