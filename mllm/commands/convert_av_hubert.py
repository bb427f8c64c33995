"""`mllm convert av-hubert` turns a released AV-HuBERT into a folder that a run config can name as its lip encoder."""

from dataclasses import dataclass

SUMMARY = "Read a released AV-HuBERT (.pt, pre-trained or fine-tuned) and write its encoder as safetensors."
POSITIONAL = "file"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Convert an AV-HuBERT checkpoint; nothing in the file is run."""

    file: str
    """Released file, e.g. large_vox_iter5.pt."""
    out: str
    """Folder to write."""


def run(settings: Settings) -> int:
    """Convert, and report what was found."""
    from mllm.commands.terminal import console, quiet_loading
    from mllm.convert.av_hubert import convert_file, save

    quiet_loading()
    made = convert_file(settings.file)
    config = made.encoder.config
    norms = "before" if config.do_stable_layer_norm else "behind"
    kind = "fine-tuned" if made.is_fine_tuned else "pre-trained"
    out = console()
    out.print(
        f"{kind}, {config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads, "
        f"norms {norms} attention",
        soft_wrap=True,
    )
    if made.dropped:
        noun = "1 entry was" if len(made.dropped) == 1 else f"{len(made.dropped)} entries were"
        shown = ", ".join(made.dropped[:5]) + (", ..." if len(made.dropped) > 5 else "")
        out.print(f"{noun} not needed: {shown}", soft_wrap=True)
    save(made, settings.out)
    out.print(f"written to {settings.out}", soft_wrap=True)
    return 0
