"""Runs `mllm router certify`: proves on other answers how little a router loses."""

from mllm.config.router import RouterCertifyConfig as Settings

__all__ = ["SUMMARY", "Settings", "run"]

SUMMARY = "Certify how little a router loses against the largest budget."


def run(settings: Settings) -> int:
    """Certifies what can be proved, writes it into the router's file, and shows what was refused; 1 if all was."""
    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, progress_bar, quiet_loading
    from mllm.evaluation.router_judging import certify_router, growing_text

    settings = settings.pinned()
    quiet_loading()
    model, processor = load_for(settings)
    with progress_bar() as show:
        certified = certify_router(
            settings, model, processor, progress=lambda done, total: show("questions", done, total)
        )
    certified.router.write(settings.model_folder)
    out = console()
    certificates = [(media, one) for media, router in certified.router.by_media.items() for one in router.certificates]
    for media, one in certificates:
        words = f"{' and '.join(media)}, {growing_text(one.max_growths)}: {one}"
        out.print(f"{words}; {one.mean_cost:.1f} tokens at that price", soft_wrap=True)
    for line in certified.refusals:
        out.print(f"refused: {line}", soft_wrap=True)
    return 0 if certificates else 1
