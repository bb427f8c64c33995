"""`mllm synthetic pretrain` trains the frozen synthetic parts again."""

from mllm.synthetic.pretrain.run import PretrainConfig as Settings

__all__ = ["SUMMARY", "Settings", "run"]

SUMMARY = "Train the frozen synthetic parts again, which takes hours."


def run(settings: Settings) -> int:
    """Train the parts and report what each measured."""
    from mllm.commands.terminal import console
    from mllm.synthetic.pretrain.run import pretrain

    for part, measured in pretrain(settings).items():
        numbers = ", ".join(f"{name} {value:g}" for name, value in measured.items())
        console().print(f"{part}: {numbers}", soft_wrap=True)
    return 0
