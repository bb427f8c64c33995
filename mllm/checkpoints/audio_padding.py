"""Lets a loaded model read audio with or without the silence that fills Whisper's window, whatever it was trained with.

Knows a model, its processor and the `encoder` block of audio. Does not know files or weights.
"""

from dataclasses import replace

from mllm.config.medium import AudioPadding
from mllm.encoders import check_block, wrap_encoder
from mllm.model.configuration import TOWER_NAMES
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor


def set_audio_padding(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    padding: AudioPadding,
    *,
    untrained_padding: bool = False,
) -> None:
    """Read audio with this padding from now on; the weights stay as they are.

    Args:
        processor: the one that belongs to the model.
        padding: window fills Whisper's window with silence, none reads clips at their own lengths.
        untrained_padding: does so although the model was trained with the other.

    Raises:
        ValueError: a model without audio or with another encoder than Whisper, or one that was trained otherwise.
    """
    config = model.config
    media = config.media or {}
    if config.host_config is not None or "audio" not in media:
        has = "is a host, whose processor pads" if config.host_config is not None else "takes no audio"
        raise ValueError(f"audio_padding is {padding}, but this model {has}; leave it out")
    encoder = media["audio"].encoder
    if encoder.padding == padding:
        return
    check_block(config.encoder_configs["audio"], replace(encoder, padding="none"))
    if not untrained_padding:
        raise ValueError(
            f"audio_padding is {padding}, and this model was trained with {encoder.padding}, so that it would hear "
            "worse; untrained_padding true does it nevertheless"
        )
    block = replace(encoder, padding=padding, untrained_padding=padding == "none")
    before = model.model.encoder("audio")
    after = wrap_encoder(before.backbone, block)
    after.frozen = before.frozen
    setattr(model.model, TOWER_NAMES["audio"], after.train(before.training))
    config.media = {**media, "audio": replace(media["audio"], encoder=block)}
    processor.media["audio"] = config.media["audio"]
    for kept in ("facts", "transforms"):
        processor.__dict__.pop(kept, None)
