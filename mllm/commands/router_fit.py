"""Runs `mllm router fit`: learns which budget a question needs, from answers at fixed budgets."""

from mllm.config.router import RouterFitConfig as Settings

__all__ = ["SUMMARY", "Settings", "run"]

SUMMARY = "Fit what chooses where a budget says auto, on held-out answers."


def run(settings: Settings) -> int:
    """Fits, writes the router beside the model, and shows what it reached on the answers it was fitted on."""
    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, plain_table, progress_bar, quiet_loading
    from mllm.evaluation.router_fitting import fit_router

    settings = settings.pinned()
    quiet_loading()
    model, processor = load_for(settings)
    with progress_bar() as show:
        router = fit_router(settings, model, processor, progress=lambda done, total: show("questions", done, total))
    router.write(settings.model_folder)
    out = console()
    for media, one in router.by_media.items():
        out.print(
            f"{' and '.join(media)}: {one.num_questions} questions about {len(one.media_digests)} items", soft_wrap=True
        )
        points = [point for point in one.points if point.max_growths][:: max(len(one.points) // 24, 1)]
        cells = [[f"{point.price:.4g}", f"{point.mean_tokens:.1f}", f"{100 * point.quality:.1f} %"] for point in points]
        out.print(plain_table(["price", "mean tokens", "of the largest budget's quality"], cells))
    out.print(f"written to {settings.model_folder / 'router.json'}", soft_wrap=True)
    return 0
