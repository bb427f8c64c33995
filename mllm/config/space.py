"""Makes the trained space of a model of the blocks of its media; the counting itself is `mllm.budget`."""

from collections.abc import Mapping

from mllm.budget import MEDIA, MediumSpace, Space
from mllm.budget.tiling import Tiling
from mllm.config.medium import FramesConfig, HybridConfig, ImageConfig, MediumConfig, PinpointsConfig, StreamQueryConfig
from mllm.config.reading import ConfigError


def space_of(media: Mapping[str, MediumConfig]) -> Space:
    """Return the budgets that a model of these media is trained on.

    Args:
        media: the blocks by medium; a video block of frames stands beside an image block.

    Raises:
        ConfigError: frames, or budgets of frames, that the compressor of images does not serve, or budgets that leave
            out the only medium.
    """
    spaces = {medium: medium_space(medium, media[medium]) for medium in MEDIA if medium in media}
    video = media.get("video")
    if video is not None and isinstance(video.encoder, FramesConfig):
        spaces["video"] = _frames_space(video, spaces["image"])
    if len(spaces) == 1 and (only := next(iter(spaces.values()))).with_none:
        raise ConfigError(f"{only.medium}.budgets", "hold none, and this model takes no other medium")
    return Space(spaces)


def medium_space(medium: str, block: MediumConfig) -> MediumSpace:
    """Return the budgets of one medium that has an encoder of its own."""
    compressor = block.compressor
    if compressor is None:  # of frames; all but the budgets is the images'
        return MediumSpace(medium=medium, compressor="pool", trained=tuple(block.amounts))
    is_hybrid = isinstance(compressor, HybridConfig)
    per_budget = bool(getattr(block.projector, "per_budget", False))
    return MediumSpace(
        medium=medium,
        compressor=compressor.counting,
        trained=tuple(block.amounts),
        max_tokens=max(block.values) if is_hybrid else block.num_queries,
        window_frames=compressor.window_frames if isinstance(compressor, StreamQueryConfig) else 0,
        between=compressor.counting != "stack" and not per_budget,
        order=getattr(compressor, "order", "raster"),
        tiling=tiling_of(block) if isinstance(block, ImageConfig) else None,
        with_none=block.with_none,
        whole_maps=isinstance(block, ImageConfig) and block.positions == "grid",
    )


def tiling_of(image: ImageConfig) -> Tiling | None:
    """Return how images are cut into tiles; None where they are not."""
    block = image.tiling
    if block is None:
        return None
    pinpoints = block.pinpoints if isinstance(block, PinpointsConfig) else []
    return Tiling(
        kind=block.kind,
        pinpoints=tuple((height, width) for height, width in pinpoints),
        max_tiles=block.max_tiles,
        thumbnail=block.thumbnail,
        merge=block.merge,
        newline=block.newline,
    )


def _frames_space(video: MediumConfig, image: MediumSpace) -> MediumSpace:
    """All but the budgets of frames is that of images."""
    if image.compressor == "hybrid":
        raise ConfigError(
            "video.encoder.kind", "is frames, which does not go with compressor hybrid of images; allowed: lips"
        )
    for amount in video.amounts:
        if not image.between and not image.is_trained(amount):
            raise ConfigError("video.budgets", f"holds {amount}, and the compressor of images serves {image.allowed()}")
    counts = video.encoder.trained_counts or [video.encoder.count]
    return MediumSpace(
        medium="video",
        compressor=image.compressor,
        trained=tuple(video.amounts),
        max_tokens=image.max_tokens,
        between=image.between,
        order=image.order,
        frame_counts=tuple(sorted(counts, reverse=True)),
    )
