"""`mllm init`: a run config for one's own media, to begin with and to change."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mllm.commands.new_config import write_new_config, yaml_scalar

SUMMARY = "Write a run config for your own media, on small models of the hub or on the synthetic parts."
POSITIONAL = "out"

_HUB = {
    "llm": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "image": "openai/clip-vit-large-patch14-336",
    "audio": "openai/whisper-small",
}
_BUILT_IN = {"llm": "synthetic:llm", "image": "synthetic:vision", "audio": "synthetic:audio", "video": "synthetic:lips"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a config that `mllm train --config` reads. What is left out is chosen: small models of the hub for one
    GPU, or with --built_in the parts that come with this package, for a first try on a CPU."""

    out: str = "run.yaml"
    """File to write; one that is there is left alone."""
    media: list[Literal["image", "audio", "video"]] = field(default_factory=lambda: ["image"])
    """What the model reads; may be given several times. Videos beside images are frames that are encoded like them;
    without images they are lips."""
    llm: str | None = None
    """Folder or hub name of the LLM with its tokenizer."""
    image_encoder: str | None = None
    """Folder or hub name of a vision encoder (CLIP, SigLIP, DINO)."""
    audio_encoder: str | None = None
    """Folder or hub name of an audio encoder (Whisper, WavLM, HuBERT)."""
    video_encoder: str | None = None
    """Folder of a lip encoder that `mllm convert av-hubert` wrote."""
    built_in: bool = False
    """Take the small LLM and encoders of the synthetic parts where none is named."""
    manifest: str = "train.jsonl"
    """Manifest to train on."""
    root: str | None = None
    """Folder that its media paths are relative to; the manifest's own when left out."""
    run_folder: str | None = None
    """Folder of the run; `runs` and the name of the config when left out."""

    def __post_init__(self) -> None:
        if not self.media:
            raise ValueError("media is empty; name at least one of image, audio, video")
        for medium in ("image", "audio", "video"):
            if getattr(self, f"{medium}_encoder") is not None and medium not in self.media:
                raise ValueError(f"{medium}_encoder is set, but media leaves {medium} out; add --media {medium}")
        if "video" in self.media and "image" not in self.media and not (self.video_encoder or self.built_in):
            raise ValueError(
                "media video without image reads lips, and hubs have no lip encoder that can be read at once: give "
                "--video_encoder, a folder that `mllm convert av-hubert` wrote, or add --media image for videos of "
                "anything"
            )


def run(settings: Settings) -> int:
    """Write the config, and say what to type next."""
    from mllm.commands.terminal import console

    path = write_new_config(config_text(settings), settings.out)
    out = console()
    root = "" if settings.root is None else f" --root {settings.root}"
    for line in (
        f"written: {path}; then",
        f"  mllm data check {settings.manifest}{root}",
        f"  mllm train --config {path}",
    ):
        out.print(line, soft_wrap=True, highlight=False)
    return 0


def config_text(settings: Settings) -> str:
    """Write the config as YAML, with comments."""
    blocks = [_block(settings, medium) for medium in ("image", "audio", "video") if medium in settings.media]
    precision = "float32" if _is_built_in(settings, "llm") else "bfloat16"
    run_folder = settings.run_folder or f"runs/{Path(settings.out).stem}"
    root = "" if settings.root is None else f"\n  root: {yaml_scalar(settings.root)}"
    # A template of the LLM's own is what chat models know; the built-in LLM has none.
    chat = "plain" if _is_built_in(settings, "llm") else "chat"
    return f"""# Written by `mllm init`. `mllm train --help` tells of the keys; the command line overrules this file:
#   mllm train --config {settings.out} --train.learning_rate 5e-4
model:
  llm: {yaml_scalar(settings.llm or _default(settings, "llm"))}  # frozen; a folder or a hub name
  chat_format: {chat}
  dtype: {precision}  # of the frozen parts
{"".join(blocks)}  adapter:  # what learns inside the LLM; left out, only the compressors learn
    kind: lora
    rank: 16
    alpha: 32
    targets: [q_proj, k_proj, v_proj, o_proj]
data:
  train: [{yaml_scalar(settings.manifest)}]  # one JSON object per line; `mllm data check` looks it over
  # validation: [validation.jsonl]  # its loss is logged at the end, or every train.validate_every steps{root}
  # limits: {{video_seconds: 600, video_frames: 15000}}  # files beyond a limit are refused; raise it for your own
  tokens_per_batch: 4096  # most tokens of a micro-batch; less where memory is short
  max_rows: 8
sampler:
  mode: random  # every step trains at budgets drawn from those above
  num_budgets: 2
train:
  out: {yaml_scalar(run_folder)}  # checkpoints, log.jsonl, and at the end the model that `mllm generate --model` reads
  epochs: 3
  learning_rate: 1.0e-3  # of the compressors
  part_learning_rates: {{adapter: 2.0e-4}}
  warmup_fraction: 0.03
  precision: {precision}
  save_every: 500  # steps; after a stop, the same line with `--resume auto` goes on from the newest
"""


def _is_built_in(settings: Settings, part: str) -> bool:
    return settings.built_in and getattr(settings, "llm" if part == "llm" else f"{part}_encoder") is None


def _default(settings: Settings, part: str) -> str:
    return (_BUILT_IN if settings.built_in else _HUB)[part]


def _block(settings: Settings, medium: str) -> str:
    """The block of one medium, indented as it stands in the model's."""
    named = getattr(settings, f"{medium}_encoder")
    if medium == "video" and named is None and "image" in settings.media:
        budgets = "[4, 16]" if settings.built_in else "[9, 36]"
        return (
            "  video:\n    encoder: {kind: frames, count: 8}  # each encoded like an image; lips need --video_encoder\n"
            f"    budgets: {budgets}  # soft tokens per frame\n"
        )
    source = yaml_scalar(named or _default(settings, medium))
    lines = _LINES[medium](settings, source, named is not None)
    return f"  {medium}:\n" + "".join(f"    {line}\n" for line in lines)


def _image_lines(settings: Settings, source: str, is_named: bool) -> list[str]:
    comment = "# soft tokens per image, all trained in one model"
    if is_named:
        return [f"encoder: {source}  # frozen", "compressor: pool", f"budgets: [1, 4, 16, 64]  {comment}"]
    if settings.built_in:
        encoder = f"encoder: {{source: {source}, feature_layer: -1}}  # frozen"
        return [encoder, "compressor: pool", "projector: linear", f"budgets: [1, 4, 16, 64]  {comment}"]
    encoder = f"encoder: {{source: {source}, feature_layer: -2}}  # frozen"
    projector = "projector: {kind: mlp, before_pooling: true}"
    return [encoder, "compressor: pool", projector, f"budgets: [1, 9, 36, 144, 576]  {comment}"]


def _audio_lines(settings: Settings, source: str, is_named: bool) -> list[str]:
    is_built_in = settings.built_in and not is_named
    encoder = f"{{source: {source}, normalize: true}}" if is_built_in else source
    budgets = 'budgets: ["/4", "/8", "/16"]  # encoder frames per soft token'
    return [f"encoder: {encoder}  # frozen", "compressor: pool", budgets]


def _video_lines(settings: Settings, source: str, is_named: bool) -> list[str]:
    encoder = source if is_named else f"{{source: {source}, crop_pixels: 44}}"
    return [f"encoder: {encoder}  # frozen", "compressor: pool", 'budgets: ["/2", "/5"]  # frames per soft token']


_LINES = {"image": _image_lines, "audio": _audio_lines, "video": _video_lines}
