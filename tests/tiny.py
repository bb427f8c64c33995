"""Real models at toy size, random weights, no files: what most tests build on.

A 2-layer Llama on the synthetic tokenizer, a CLIP encoder on an 8x8 grid, Whisper on 1-second windows, and a lip
encoder with a handful of channels.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from blocks import medium, merged
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from mllm.checkpoints.build import config_of_parts
from mllm.config.model import LoraConfig, ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.encoders import AVHubertConfig, backbone_class
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.synthetic.tokenizer import build_tokenizer

TOKENIZER: PreTrainedTokenizerFast = build_tokenizer()

MEDIA: dict[str, dict[str, Any]] = {
    "image": {"encoder": {"feature_layer": -1}, "compressor": "pool", "budgets": [1, 4, 16, 64]},
    "audio": {"compressor": "pool", "budgets": ["/4", "/8"]},
    "video": {"encoder": {"kind": "lips", "crop_pixels": 32}, "compressor": "stack", "budgets": ["/2", "/5"]},
}


def llm_config(**changes: Any) -> LlamaConfig:
    """A Llama of 2 layers, 32 wide."""
    return LlamaConfig(
        **{
            "vocab_size": len(TOKENIZER),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": TOKENIZER.bos_token_id,
            "eos_token_id": TOKENIZER.eos_token_id,
            "pad_token_id": TOKENIZER.pad_token_id,
            **changes,
        }
    )


def encoder_configs() -> dict[str, PreTrainedConfig]:
    """Tiny CLIP (8x8 patches), Whisper (1 s) and AV-HuBERT."""
    return {
        "image": CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            projection_dim=16,
        ),
        "audio": WhisperConfig(
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            num_mel_bins=80,
            max_source_positions=50,
        ),
        "video": AVHubertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            resnet_channels=[4, 4, 8, 8],
        ),
    }


def settings(
    media: Sequence[str] = ("image", "audio", "video"), *, adapter: bool = True, **changes: dict[str, Any]
) -> ModelConfig:
    """Settings of a tiny model; `changes` are by medium. The sources are names of nothing."""
    blocks = {m: medium(m, MEDIA[m], **changes.get(m, {})) for m in media}
    lora = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"]) if adapter else None
    return ModelConfig(llm="none", chat_format="plain", adapter=lora, **blocks)


def config(settings: ModelConfig, **text: Any) -> ElasticConfig:
    """The config of a tiny model."""
    configs, ids = encoder_configs(), TOKENIZER.convert_tokens_to_ids
    return config_of_parts(
        settings,
        text_config=llm_config(**text),
        encoder_configs={m: configs[m] for m in settings.encoded_media},
        placeholder_ids={m: ids(PLACEHOLDER_TOKENS[m]) for m in settings.encoded_media},
    )


def processor(settings: ModelConfig, *, tokenizer: Any = TOKENIZER, **elastic: Any) -> ElasticProcessor:
    """The processor of a tiny model; it reads real files. `elastic` changes what it keeps itself."""
    preprocessors = {
        "image": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": 64, "width": 64},
            "do_center_crop": False,
        },
        "audio": WhisperFeatureExtractor(feature_size=80, chunk_length=1).to_dict(),
        "video": {},
    }
    kept = {m: preprocessors[m] for m in settings.encoded_media}
    processor_config = ProcessorConfig(**{"chat_format": "plain", "preprocessors": kept, **elastic})
    return ElasticProcessor(tokenizer, config(settings), processor_config)


def model(settings: ModelConfig, *, seed: int = 0, **text: Any) -> ElasticForConditionalGeneration:
    """A tiny model with random weights, its adapter in place, in eval mode."""
    from mllm.checkpoints.build import put_adapters

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ElasticForConditionalGeneration(config(settings, **text))
        for parameter in made.parameters():  # initial values are so small that every output would be the same
            if parameter.dim() > 1:
                parameter.data.mul_(4)
    put_adapters(made, seed=seed)
    if settings.has_adapter:
        for name, parameter in made.named_parameters():
            if ".lora_B" in name:  # zero at first, so that an untouched adapter would not show
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return made.eval()


def random_media(medium: str, length: int = 0, *, seed: int = 0) -> LoadedMedia:
    """Encoder input of one item: an image, or a stream of `length` feature frames."""
    generator = torch.Generator().manual_seed(seed)
    if medium == "image":
        return LoadedMedia("image", torch.randn(3, 64, 64, generator=generator))
    if medium == "audio":
        return LoadedMedia("audio", torch.randn(80, 100, generator=generator), length * 320)
    return LoadedMedia("video", torch.randn(length, 1, 32, 32, generator=generator), length)


def batch(
    made: ElasticProcessor, rows: Sequence[tuple[Sequence[str | LoadedMedia], str]], *, for_training: bool = False
) -> Batch:
    """A batch of rows (user parts, answer); a part is a text or loaded media."""
    from mllm.data.manifest import Media, Message, Sample, Text

    samples, media = [], []
    for index, (parts, answer) in enumerate(rows):
        content = tuple(Text(part) if isinstance(part, str) else Media(part.medium, "x") for part in parts)  # type: ignore[arg-type]
        messages = (Message("user", content), Message("assistant", (Text(answer),)))
        samples.append(Sample(f"row{index}", messages, task="test"))
        media.append([part for part in parts if isinstance(part, LoadedMedia)])
    return made.batch(samples, media, for_training=for_training)


def write_parts(folder: Path, **text: Any) -> dict[str, str]:
    """Save the tiny frozen parts as a hub repository would hold them; returns their folders by name.

    `text` changes the config of the LLM.
    """
    configs = encoder_configs()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(llm_config(**text)).save_pretrained(folder / "llm")
        for medium, config in configs.items():
            backbone_class(config)._from_config(config).save_pretrained(folder / medium)
    TOKENIZER.save_pretrained(folder / "llm")
    CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(folder / "image")
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(folder / "audio")
    return {name: str(folder / name) for name in ("llm", *configs)}


def settings_on(
    parts: dict[str, str], media: Sequence[str] = ("image", "audio", "video"), **changes: dict[str, Any]
) -> ModelConfig:
    """Settings of a tiny model whose frozen parts are the folders of `write_parts`; `changes` are by medium."""
    blocks = {m: medium(m, merged(MEDIA[m], {"encoder": parts[m]}, changes.get(m, {}))) for m in media}
    lora = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"])
    return ModelConfig(llm=parts["llm"], chat_format="plain", adapter=lora, **blocks)


def write_media(folder: Path, *, seconds: float = 0.8, seed: int = 0) -> dict[str, str]:
    """A real png, wav (16 kHz) and mp4 (25 frames/s); returns their names by medium."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{seed}.png")
    soundfile.write(folder / f"{seed}.wav", rng.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32), 16_000)
    with av.open(folder / f"{seed}.mp4", "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        for _ in range(round(seconds * 25)):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {"image": f"{seed}.png", "audio": f"{seed}.wav", "video": f"{seed}.mp4"}


def write_clip(video: Path, audio: Path, clip: Path) -> None:
    """Put the frames of one file and the samples of another into one."""
    samples, rate = soundfile.read(audio, dtype="int16")
    with av.open(video) as frames, av.open(clip, "w") as out:
        file, voice = out.add_stream("libx264", rate=25), out.add_stream("pcm_s16le", rate=rate, layout="mono")
        file.width, file.height, file.pix_fmt = 48, 48, "yuv420p"
        for number, frame in enumerate(frames.decode(video=0)):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(file.encode(frame))
        out.mux(file.encode())
        block = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = rate, 0, Fraction(1, rate)
        out.mux(voice.encode(block))
        out.mux(voice.encode())
