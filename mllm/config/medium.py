"""Holds what a user writes to describe how one medium becomes soft tokens: `model.image`, `audio` and `video`.

    encoder -> compressor -> projector        each a dataclass, of one kind of several where there are several

Plain dataclasses. A value that follows from a part on disk is "auto" here; `mllm.checkpoints.resolve` puts in the
number once the parts are known. What depends on other keys alone has a property that tells it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mllm.budget import NONE, Amount, Compression
from mllm.budget.nesting import check_nesting, nesting_sizes
from mllm.config.checks import Auto, check_at_least
from mllm.config.projector import LinearConfig, MlpConfig, MoeConfig, NoProjectorConfig, WordsConfig
from mllm.config.reading import ConfigError, block, kinds
from mllm.utils.registry import Registry

AudioPadding = Literal["window", "none"]


@dataclass(frozen=True, kw_only=True)
class EncoderAdapterConfig:
    """LoRA inside an encoder whose weights stay frozen otherwise."""

    rank: int = 64
    """The inner size itself."""
    alpha: float = 128.0
    """The update is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names the linear layers that get one, by the last parts of their names."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """The encoder of images."""

    source: str
    """Names the folder, hub name or synthetic part of the encoder (CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3)."""
    feature_layer: int = -2
    """Names the hidden layer that gives the features; -1 is the last."""
    final_norm: bool = False
    """Sends that layer through the encoder's own final norm."""
    image_size: list[int] | None = None
    """Squeezes images to [height, width] in pixels; the encoder's own image processor decides when left out."""
    max_num_patches: int | Auto = "auto"
    """Caps the patches of an image where images keep their shape (SigLIP 2); auto is what it was trained on."""
    pad_to_square: bool = False
    """Makes images square by margins in the mean colour, as LLaVA-1.5's second stage, MQT-LLaVA and M3 do; otherwise
    the encoder's image processor decides (CLIP's cuts the middle out)."""
    adapter: EncoderAdapterConfig | None = None
    """Puts LoRA into the encoder, which learns with the LLM's adapter; nothing when left out."""

    def __post_init__(self) -> None:
        size = self.image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError("image_size", f"is [height, width] in pixels, got {size}")
        check_at_least(self, ("max_num_patches",))


@dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """The encoder of audio."""

    source: str
    """Names the folder, hub name or synthetic part of the encoder (Whisper, WavLM, HuBERT, wav2vec 2.0, AV-HuBERT)."""
    normalize: bool = False
    """Scales every clip to zero mean and unit variance first, as the AVSR papers do."""
    released_cut: bool = False
    """Keeps as many frames of Whisper as the released AVSR code cuts out, `max(int(samples / 16000 * 50), 25)`, instead
    of the whole frames of the clip; `released_behaviour` sets it."""
    padding: AudioPadding = "window"
    """Fills every clip with silence up to Whisper's window (30 seconds), as it was trained, or with none reads it at
    its own length, which takes a fraction of the time; none is for an encoder that learns, see untrained_padding."""
    untrained_padding: bool = False
    """Takes padding none with an encoder that does not learn here, and may have been trained on whole windows."""
    adapter: EncoderAdapterConfig | None = None
    """Puts LoRA into the encoder, which learns with the LLM's adapter; nothing when left out."""

    def __post_init__(self) -> None:
        if self.padding == "none" and self.released_cut:
            raise ConfigError("padding", "is none, and released_cut counts frames of silence; leave one of them out")
        if self.untrained_padding and self.padding == "window":
            raise ConfigError("untrained_padding", "is true; it goes with padding none")


@dataclass(frozen=True, kw_only=True)
class LipsConfig:
    """The encoder of lip videos."""

    kind: Literal["lips"] = "lips"
    """Reads lips from crops around the mouth."""
    source: str
    """Names the folder or synthetic part of the encoder (AV-HuBERT)."""
    size_pixels: int | None = None
    """Brings the shorter side of each frame to this many pixels first; frames stay as they are when left out."""
    crop_pixels: int = 88
    """Sets the side of the square that is cut from the middle of each frame."""
    adapter: EncoderAdapterConfig | None = None
    """Puts LoRA into the encoder, as Omni-AVSR does; it learns with the LLM's adapter. Nothing when left out."""

    def __post_init__(self) -> None:
        if self.source in ("image", "frames"):
            raise ConfigError(
                "source", f"is {self.source!r}; for frames that are encoded like images write encoder: {{kind: frames}}"
            )
        check_at_least(self, ("size_pixels", "crop_pixels"))


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """Videos of anything: frames, each of which goes through the encoder, compressor and projector of images."""

    kind: Literal["frames"] = "frames"
    """Encodes frames like images; needs an image block."""
    count: int = 8
    """Caps the frames taken from a file."""
    trained_counts: list[int] = field(default_factory=list)
    """Lists the numbers of frames that training shows, each a divisor of count; all of the frames when empty."""
    sampling: Literal["uniform", "fps"] = "uniform"
    """Takes frames evenly over the clip, or frames_per_second of them as long as that gives no more than count."""
    frames_per_second: float | None = None
    """Sets the rate of the sampling fps; uniform has none."""

    def __post_init__(self) -> None:
        check_at_least(self, ("count",))
        rate = self.frames_per_second
        if (self.sampling == "fps") != (rate is not None) or (rate is not None and rate <= 0):
            raise ConfigError(
                "frames_per_second", f"is {rate}; a number above 0 goes with sampling fps and only with it"
            )
        if wrong := [count for count in self.trained_counts if count < 1 or self.count % count]:
            divisors = ", ".join(str(n) for n in range(1, self.count + 1) if self.count % n == 0)
            raise ConfigError(
                "trained_counts", f"holds {wrong[0]}; allowed are the divisors of {self.count} frames: {divisors}"
            )


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Average pooling, to any rate or count."""

    counting: ClassVar[Compression] = "pool"
    """The rule by which budgets are counted; a compressor from outside names the one it follows."""
    kind: Literal["pool"] = "pool"
    """Averages features."""


@dataclass(frozen=True, kw_only=True)
class ImagePoolConfig(PoolConfig):
    """Average pooling of a grid, to any count."""

    order: Literal["raster", "haar"] = "raster"
    """Orders the tokens as one reads, or coarse to fine (haar), where the tokens of a small budget are the first ones
    of a large; then counts are those of whole grids: 9, 36, 144, 576."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Matryoshka queries (MQT), of which a budget uses the first ones."""

    counting: ClassVar[Compression] = "query"
    kind: Literal["query"] = "query"
    """Reads features by queries."""
    num_queries: int | Auto = "auto"
    """Sets how many queries there are, on a stream per window; auto is as many as the largest budget needs."""
    keys: Literal["position", "content"] = "position"
    """Lets queries look at positions alone (MQT as released), or at the features too."""
    num_heads: int | Auto = "auto"
    """Sets the attention heads; auto is one per 64 of the encoder's feature size."""

    def __post_init__(self) -> None:
        check_at_least(self, ("num_queries", "num_heads"))


@dataclass(frozen=True, kw_only=True)
class ImageQueryConfig(QueryConfig):
    """Matryoshka queries on a grid."""

    start: Literal["released", "pyramid"] = "released"
    """Starts fresh queries everywhere alike (MQT as released), or each at its own cell, coarse to fine; the latter
    needs keys: position."""


@dataclass(frozen=True, kw_only=True)
class StreamQueryConfig(QueryConfig):
    """Matryoshka queries on each window of a stream."""

    window_frames: int
    """Sets the length of a window in encoder frames; every rate divides it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, ("window_frames",))


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Neighbouring features joined along the feature axis, with a projector per budget."""

    counting: ClassVar[Compression] = "stack"
    kind: Literal["stack"] = "stack"
    """Joins features."""


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """A pooled grid and nested queries behind it (after PARCEL)."""

    counting: ClassVar[Compression] = "hybrid"
    kind: Literal["hybrid"] = "hybrid"
    """Pools features and reads what that leaves out by queries."""
    anchors: list[int] | Auto = "auto"
    """Lists the sizes of the pooled grid beside 1; auto is 16 and 64 where the largest budget is above them."""
    num_heads: int | Auto = "auto"
    """Sets the attention heads; auto is one per 64 of the encoder's feature size."""

    def __post_init__(self) -> None:
        check_at_least(self, ("num_heads",))


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """Images of any resolution: cut into tiles that are each encoded."""

    thumbnail: bool = True
    """Shows the whole image first, squeezed into one tile."""
    merge: Literal["spatial_unpad", "flat"] = "spatial_unpad"
    """Puts the tokens of all tiles together as one grid without what lies over padding (LLaVA-NeXT), or leaves the
    tiles one after the other."""
    newline: bool = True
    """Ends each row of the grid, or of tiles when flat, with a learned token."""


@dataclass(frozen=True, kw_only=True)
class PinpointsConfig(TilingConfig):
    """Tiles in one of several sizes."""

    kind: Literal["pinpoints"] = "pinpoints"
    """Allows the sizes listed."""
    pinpoints: list[list[int]] = field(default_factory=list)
    """Lists sizes [height, width] in pixels, each of whole tiles; LLaVA-NeXT's five shapes when empty."""
    max_tiles: int | None = None
    """Caps the tiles of an image; no cap when left out."""

    def __post_init__(self) -> None:
        check_at_least(self, ("max_tiles",))
        if not self.thumbnail and self.max_tiles is not None:
            raise ConfigError("max_tiles", "may leave no pinpoint, and there is no thumbnail; list fewer pinpoints")
        if wrong := [size for size in self.pinpoints if len(size) != 2]:
            raise ConfigError("pinpoints", f"holds {wrong[0]}; a size is [height, width] in pixels")


@dataclass(frozen=True, kw_only=True)
class FreeTilesConfig(TilingConfig):
    """Tiles in every number of rows and columns."""

    kind: Literal["free"] = "free"
    """Allows every rows x columns of at most max_tiles tiles."""
    max_tiles: int
    """Caps the tiles of an image."""

    def __post_init__(self) -> None:
        check_at_least(self, ("max_tiles",))


VIDEO_ENCODERS: dict[str, type] = {"lips": LipsConfig, "frames": FramesConfig}
STREAM_COMPRESSORS: Registry[type] = Registry(
    "compressor", {"pool": PoolConfig, "query": StreamQueryConfig, "stack": StackConfig}
)
IMAGE_COMPRESSORS: Registry[type] = Registry(
    "compressor", {"pool": ImagePoolConfig, "query": ImageQueryConfig, "stack": StackConfig, "hybrid": HybridConfig}
)
COMPRESSORS: dict[str, Registry[type]] = {
    "image": IMAGE_COMPRESSORS,
    "audio": STREAM_COMPRESSORS,
    "video": STREAM_COMPRESSORS,
}
"""By medium; those of audio and video are one."""
PROJECTORS: dict[str, type] = {
    "mlp": MlpConfig,
    "linear": LinearConfig,
    "moe": MoeConfig,
    "words": WordsConfig,
    "none": NoProjectorConfig,
}
TILINGS: dict[str, type] = {"pinpoints": PinpointsConfig, "free": FreeTilesConfig}

Compressor = PoolConfig | QueryConfig | StackConfig | HybridConfig
Projector = MlpConfig | LinearConfig | MoeConfig | WordsConfig | NoProjectorConfig


class MediumConfig:
    """What the blocks of all media have in common."""

    encoder: Any
    compressor: Any
    projector: Any
    budgets: list[str | int] | dict[str, int]
    span: list[str]

    @property
    def amounts(self) -> list[Amount]:
        """Return the trained budgets, each once, largest first, but for `none`."""
        amounts = {amount for amount in self._listed() if amount != NONE}
        counts = {amount.kind for amount in amounts} == {"tokens"}
        return sorted(amounts, key=lambda amount: amount.value, reverse=counts)

    @property
    def with_none(self) -> bool:
        """Tell whether requests are also trained without the medium."""
        return NONE in self._listed()

    def _listed(self) -> list[Amount]:
        listed = self.budgets
        if isinstance(listed, Mapping):
            listed = list(range(listed["start"], listed["stop"] + 1, listed["step"]))
        return [Amount.parse(item) for item in listed]

    @property
    def values(self) -> list[int]:
        """Return the trained counts or rates as numbers, largest budget first."""
        return [int(amount.value) for amount in self.amounts]

    @property
    def has_counts(self) -> bool:
        """Tell whether the trained budgets are counts, and not rates."""
        return self.amounts[0].kind == "tokens"

    @property
    def num_queries(self) -> int:
        """Count the queries of the compressor query, on a stream per window; 0 for the others."""
        if not isinstance(self.compressor, QueryConfig):
            return 0
        if self.compressor.num_queries != "auto":
            return self.compressor.num_queries
        if isinstance(self.compressor, StreamQueryConfig):
            return max(self.compressor.window_frames // rate for rate in self.values)
        return max(self.values)

    @property
    def anchors(self) -> tuple[int, ...]:
        """Return the sizes of the pooled grid of the compressor hybrid, smallest first, 1 among them."""
        assert isinstance(self.compressor, HybridConfig)
        listed = self.compressor.anchors
        return nesting_sizes(self.values, None if listed == "auto" else listed)

    def fill_defaults(self) -> None:
        """Give what follows from the kind of the compressor its default, and refuse what it leaves no room for."""
        if isinstance(self.compressor, QueryConfig):
            if self.projector is not None:
                raise ConfigError("projector", "does not go with compressor query, whose queries give the LLM's size")
        elif self.projector is None:
            # Without an encoder the features are a host's, which has projected them.
            object.__setattr__(self, "projector", NoProjectorConfig() if self.encoder is None else MlpConfig())

    def check(self) -> None:
        """Refuse what contradicts itself whatever the encoder is.

        Raises:
            ConfigError: with the key in this block.
        """
        if isinstance(self.budgets, Mapping) and set(self.budgets) != {"start", "stop", "step"}:
            raise ConfigError("budgets", f"is a list, or {{start, stop, step}} of counts; got {self.budgets}")
        if isinstance(self.budgets, Mapping) and min(self.budgets.values()) < 1:
            raise ConfigError("budgets", f"has start, stop and step from 1 on; got {self.budgets}")
        try:
            amounts = self.amounts
        except ValueError as error:
            raise ConfigError("budgets", f": {error}") from error
        kinds = {amount.kind for amount in amounts}
        if len(kinds) != 1 or not kinds <= {"tokens", "rate"}:
            raise ConfigError("budgets", f"must be counts only or rates only, and not empty; got {self.budgets}")
        if len(self.span) not in (0, 2):
            raise ConfigError("span", f"is the token before and the token after, got {self.span}")

    def check_projector(self) -> None:
        """Refuse a projector that the compressor has no use for."""
        kind = self.compressor.kind
        if isinstance(self.projector, WordsConfig) and kind != "pool":
            raise ConfigError("projector.kind", f"is words, which goes with compressor pool, not {kind}")
        if getattr(self.projector, "before_pooling", False) and kind != "pool":
            raise ConfigError("projector.before_pooling", f"goes with compressor pool, not {kind}")
        if not getattr(self.projector, "per_budget", False):
            return
        if kind == "stack":
            raise ConfigError("projector.per_budget", "is so of compressor stack in any case; leave it out")
        if kind == "hybrid":
            raise ConfigError("projector.per_budget", "does not go with compressor hybrid; allowed: false")
        if getattr(self.compressor, "order", "raster") == "haar":
            raise ConfigError("projector.per_budget", "would break the nesting of order haar; allowed: false")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(MediumConfig):
    """How images become soft tokens."""

    encoder: ImageEncoderConfig | None = field(default=None, metadata=block(text="source"))
    """Gives the features of an image; plain text is its source. Left out with model.host, which brings its own."""
    compressor: Any = field(default_factory=ImagePoolConfig, metadata=kinds(IMAGE_COMPRESSORS, default="pool"))
    """Makes any number of tokens of the features; plain text is its kind."""
    projector: Any = field(default=None, metadata=kinds(PROJECTORS, default="mlp"))
    """Brings tokens to the LLM's size; plain text is its kind. A mlp when left out, none for query."""
    budgets: list[str | int] | dict[str, int]
    """Lists the counts of soft tokens that are trained, e.g. [1, 4, 16, 64], or {start, stop, step} of them, stop
    included; rates, e.g. ["/1", "/4"], for a model.host whose images keep their shape."""
    tiling: Any = field(default=None, metadata=kinds(TILINGS, default="pinpoints"))
    """Cuts images of any resolution into tiles; each image is squeezed into one when left out."""
    positions: Literal["original", "grid"] | None = None
    """Says where pooled tokens stand, for a model.host whose positions have three dimensions: at the mean of what they
    were pooled of (original, when left out), or as those of an image that small (grid)."""
    span: list[str] = field(default_factory=list)
    """Names the tokens before and after an image's, e.g. ["<image>", "</image>"]; none when empty. Those that the LLM's
    tokenizer does not know get embedding rows of their own, which learn with the compressors."""

    def __post_init__(self) -> None:
        self.fill_defaults()
        self.check()
        if not self.has_counts and self.encoder is not None:
            raise ConfigError("budgets", f"are rates ({self.amounts[0]}); images take counts (64)")
        if self.with_none:
            raise ConfigError("budgets", "hold none, which is for audio and lips; an image is never left out")
        self.check_projector()
        if isinstance(self.projector, WordsConfig):
            raise ConfigError("projector.kind", "is words, which are heard one after the other; an image has no order")
        compressor = self.compressor
        if isinstance(compressor, ImageQueryConfig) and compressor.start == "pyramid" and compressor.keys != "position":
            raise ConfigError("compressor.start", "pyramid needs keys: position; got content")
        if isinstance(compressor, QueryConfig):
            self._check_most(self.num_queries, "compressor.num_queries")
        if isinstance(compressor, HybridConfig):
            self._check_hybrid()
        order = getattr(compressor, "order", "raster")
        is_map = not isinstance(compressor, QueryConfig) and order == "raster"
        if self.tiling is not None and self.tiling.merge == "spatial_unpad" and not is_map:
            raise ConfigError(
                "tiling.merge",
                "spatial_unpad needs tokens that form a grid in reading order, those of pool or stack; allowed here: "
                "flat",
            )

    def _check_most(self, most: int, key: str) -> None:
        if (largest := max(self.values)) > most:
            raise ConfigError("budgets", f": {largest} tokens cannot be met; {key} allows counts 1..{most}")

    def _check_hybrid(self) -> None:
        if isinstance(self.projector, MoeConfig):
            raise ConfigError(
                "projector.kind", "is moe, which does not go with compressor hybrid; allowed: mlp, linear"
            )
        most, sizes = max(self.values), self.anchors
        if sizes[0] < 1 or sizes[-1] > most:
            listed = self.compressor.anchors
            raise ConfigError("compressor.anchors", f"is {listed}; allowed are counts 1..{most}, the largest budget")
        if problem := check_nesting(self.values, sizes):
            raise ConfigError("budgets", problem)


@dataclass(frozen=True, kw_only=True)
class AudioConfig(MediumConfig):
    """How audio becomes soft tokens."""

    encoder: AudioEncoderConfig | None = field(default=None, metadata=block(text="source"))
    """Gives the features of a clip; plain text is its source. Left out with model.host, which brings its own."""
    compressor: Any = field(default_factory=PoolConfig, metadata=kinds(STREAM_COMPRESSORS, default="pool"))
    """Makes fewer tokens of the features; plain text is its kind."""
    projector: Any = field(default=None, metadata=kinds(PROJECTORS, default="mlp"))
    """Brings tokens to the LLM's size; plain text is its kind. A mlp when left out, none for query."""
    budgets: list[str | int] | dict[str, int]
    """Lists the rates that are trained, e.g. ["/4", "/16"] encoder frames per token, or counts; with "none" requests
    are trained without audio too, where they hold another medium."""
    span: list[str] = field(default_factory=list)
    """Names the tokens before and after a clip's, e.g. ["<audio>", "</audio>"]; none when empty. Those that the LLM's
    tokenizer does not know get embedding rows of their own, which learn with the compressors."""

    def __post_init__(self) -> None:
        self.fill_defaults()
        self.check()
        check_stream(self)
        self.check_projector()


@dataclass(frozen=True, kw_only=True)
class VideoConfig(MediumConfig):
    """How videos become soft tokens: lips, or frames that are encoded like images."""

    encoder: Any = field(metadata=kinds(VIDEO_ENCODERS, default="lips", text="source"))
    """Gives the features of a clip; plain text is the source of a lip encoder. Frames take encoder, compressor and
    projector from the image block."""
    compressor: Any = field(default=None, metadata=kinds(STREAM_COMPRESSORS, default="pool"))
    """Makes fewer tokens of the features of lips; plain text is its kind. Pooling when left out."""
    projector: Any = field(default=None, metadata=kinds(PROJECTORS, default="mlp"))
    """Brings tokens of lips to the LLM's size; plain text is its kind. A mlp when left out, none for query."""
    budgets: list[str | int] | dict[str, int]
    """Lists the rates that are trained, e.g. ["/2", "/5"] encoder frames per token, or counts; with "none" requests are
    trained without lips too, where they hold another medium. Of frames, the counts of soft tokens of each."""
    span: list[str] = field(default_factory=list)
    """Names the tokens before and after a video's, e.g. ["<video>", "</video>"]; none when empty. Those that the LLM's
    tokenizer does not know get embedding rows of their own, which learn with the compressors."""

    def __post_init__(self) -> None:
        if self.shows_frames:
            for key in ("compressor", "projector"):
                if getattr(self, key) is not None:
                    raise ConfigError(key, "is that of the image block where encoder.kind is frames; leave it out")
            self.check()
            if not self.has_counts:
                raise ConfigError("budgets", f"are rates ({self.amounts[0]}); frames take counts (64)")
            if self.with_none:
                raise ConfigError("budgets", "hold none, which is for audio and lips; frames are never left out")
            return
        if self.compressor is None:
            object.__setattr__(self, "compressor", PoolConfig())
        self.fill_defaults()
        self.check()
        check_stream(self)
        self.check_projector()

    @property
    def shows_frames(self) -> bool:
        """Tell whether videos are frames that are encoded like images."""
        return isinstance(self.encoder, FramesConfig)


def check_stream(medium: MediumConfig) -> None:
    """Refuse budgets that a compressor of streams never serves.

    Raises:
        ConfigError: counts for other than pool, or rates that do not divide the window of query.
    """
    compressor = medium.compressor
    if medium.has_counts and not isinstance(compressor, PoolConfig):
        raise ConfigError(
            "budgets", f"are counts ({medium.amounts[0]}); compressor {compressor.kind} on a stream takes rates (/4)"
        )
    if isinstance(compressor, StreamQueryConfig):
        window, queries = compressor.window_frames, medium.num_queries
        for rate in medium.values:
            if window % rate or window // rate > queries:
                raise ConfigError(
                    "budgets",
                    f": /{rate} must divide compressor.window_frames={window} into at most "
                    f"compressor.num_queries={queries} tokens",
                )


def with_source(medium: Any, source: str) -> Any:
    """Return a medium's block with its encoder read from elsewhere."""
    return replace(medium, encoder=replace(medium.encoder, source=source))
