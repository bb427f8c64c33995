"""Runs an evaluation from its config to results on disk, on any number of processes.

Knows configs, ranks and the order of steps. The steps are in `work_list`, `sweep`, `report` and `plot`.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mllm.budget import Budget
from mllm.config.evaluation import EvaluationConfig
from mllm.data.manifest import Sample
from mllm.data.readers import read_data
from mllm.data.vision.short_answers import question_ids
from mllm.evaluation.answer_store import HYPOTHESES, AnswerStore, Line
from mllm.evaluation.benchmarks import report_of, write_submissions
from mllm.evaluation.comparison import comparison_of, short_name
from mllm.evaluation.fingerprint import fingerprint_of
from mllm.evaluation.flops import cost_problem
from mllm.evaluation.noise import EvaluationNoise, read_noise
from mllm.evaluation.plot import PLOT, plot_pareto
from mllm.evaluation.report import Results, summarise
from mllm.evaluation.request_costs import ModelCosts
from mllm.evaluation.routing_of_evaluation import compare_evaluated
from mllm.evaluation.routing_plot import PLOT as ROUTING_PLOT
from mllm.evaluation.routing_plot import plot_rows
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.evaluation.sweep import Sweep
from mllm.evaluation.work_list import Work, plan
from mllm.inference.answerer import Answerer
from mllm.media import Audio
from mllm.router.router import router_for
from mllm.utils.files import digest_of_file, write_text_whole
from mllm.utils.run_paths import RUN_CONFIG, run_of

logger = logging.getLogger(__name__)
ROUTING = "routing"
"""The folder of the comparison of `auto` with fixed budgets."""
Progress = Callable[[int, int], None]
"""Called with how many answers of this rank are done, and how many there are."""


def evaluate(settings: EvaluationConfig, *, progress: Progress | None = None) -> Results | None:
    """Evaluates a model and writes `hypotheses.jsonl`, `results.json`, `results.csv` and `pareto.png`.

    Where speech was evaluated, `speech.md`, `speech.json` and `speech.png` lay it out as its papers do; where vision
    benchmarks were, `benchmarks.md`, `benchmarks.json` and `benchmarks.png` do, and `submissions` is for servers. Where
    `auto` was and the fixed budgets of its router too, `routing` compares them (see `routing_of_evaluation.py`).
    Start it with a launcher to share the work among processes; what has been answered before is not answered again.

    Returns:
        The results on the first process, None on the others.

    Raises:
        ValueError: see `plan`, `AnswerStore.claim`, `check_noise` and `router_for`.
        FileNotFoundError: no such model or manifest, or no router for `auto`.
    """
    from accelerate import PartialState

    from mllm.media import MediaLoader
    from mllm.utils.distributed import prepare_launch

    settings = settings.pinned()
    check_noise(settings)
    noise = None if settings.noise is None else read_noise(settings.noise, settings.limits)
    whole = read_sets(settings)
    samples = {name: set_samples[: settings.limit] for name, set_samples in whole.items()}
    all_ids = all_vqav2_ids(settings, samples)
    prepare_launch(use_cpu=settings.use_cpu, deepspeed=False)
    state = PartialState()
    answerer = _answerer(settings, state.device)
    allowed, space = settings.allow_untrained, answerer.processor.space
    work = plan(samples, settings.parsed_budgets, space=space, snrs_db=settings.snr_db, allow_untrained=allowed)
    store = AnswerStore(settings.output_folder, rank=state.process_index)
    if state.is_main_process:
        store.claim(fingerprint_of(settings, whole))
    state.wait_for_everyone()
    sweep = Sweep(
        answerer,
        store,
        noise=noise,
        seed=settings.seed,
        loader=MediaLoader(
            gray=True,
            backend=settings.video_backend,
            max_mismatch_seconds=settings.max_mismatch_seconds,
            limits=settings.limits,
        ),
        allow_untrained=allowed,
        max_rows=settings.max_rows,
    )
    run_part(sweep, work, rank=state.process_index, num_ranks=state.num_processes, progress=progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    facts = _facts(settings, answerer.model.config)
    results = conclude(work, store, seed=settings.seed, facts=facts, all_ids=all_ids)
    if all(budget.auto is None for budget in settings.parsed_budgets):
        return results
    return replace(results, routing=_write_routing(settings, answerer, work, store, noise))


def _write_routing(
    settings: EvaluationConfig, answerer: Answerer, work: Sequence[Work], store: AnswerStore, noise: Audio | None
) -> dict[str, str]:
    """Writes the comparison of `auto` with fixed budgets, a folder per set of media.

    Returns:
        The table by media, or what has to be evaluated for one.
    """
    samples = {(item.set_name, item.sample.id): item.sample for item in work}
    heard = None if noise is None else EvaluationNoise(noise, settings.seed)
    lines, folder = gather(work, store), settings.model_folder
    texts = {}
    for media, report in compare_evaluated(answerer, lines, samples, heard, folder=folder, seed=settings.seed).items():
        if isinstance(report, str):
            texts[" and ".join(media)] = report
            continue
        out = store.folder / ROUTING / "_".join(media)
        report.write(out)
        plot_rows(report.rows, out / ROUTING_PLOT)
        texts[" and ".join(media)] = report.to_markdown()
    return texts


def _answerer(settings: EvaluationConfig, device: Any) -> Answerer:
    """Loads the model that is evaluated, on its device."""
    from mllm.checkpoints.load import load_for
    from mllm.inference.answerer import Decoding

    model, processor = load_for(settings, device=device)
    folder = settings.model_folder
    return Answerer(
        model,
        processor,
        Decoding(
            settings.num_beams,
            settings.max_new_tokens,
            length_penalty=settings.length_penalty,
            static_cache=settings.static_cache,
        ),
        settings.batch_size,
        long_audio=settings.read_long_audio(),
        constant_prompt=settings.constant_prompt,
        router=router_for(folder, settings.parsed_budgets),
        request_costs=ModelCosts(model, processor, folder),
    )


def evaluate_model(
    answerer: Answerer,
    sets: Mapping[str, Sequence[Sample]],
    budgets: Sequence[Budget],
    *,
    output: str | Path,
    fingerprint: Mapping[str, Any],
    seed: int = 0,
    with_plot: bool = True,
    allow_untrained: bool = False,
) -> Results:
    """Evaluates a model that is at hand, in this process alone; writes what `evaluate` writes.

    Args:
        fingerprint: whatever tells this model and these samples from others; answers of another one are refused.
        with_plot: drawing takes seconds.
        allow_untrained: answer at amounts that training did not sample.
    """
    work = plan(sets, budgets, space=answerer.processor.space, allow_untrained=allow_untrained)
    store = AnswerStore(output)
    store.claim(fingerprint)
    run_part(Sweep(answerer, store, seed=seed, allow_untrained=allow_untrained), work)
    facts = {**fingerprint, **_cost_facts(answerer.model.config)}
    return conclude(work, store, seed=seed, facts=facts, with_plot=with_plot)


def read_sets(settings: EvaluationConfig) -> dict[str, list[Sample]]:
    """Reads all samples of every manifest, by its short name."""
    named = zip(settings.set_names, settings.manifest, strict=True)
    return {name: read_data(path, settings.root, settings.reader) for name, path in named}


def all_vqav2_ids(settings: EvaluationConfig, sets: Mapping[str, Sequence[Sample]]) -> list[int]:
    """Lists every question of VQAv2's test set, where a file of them is named.

    Raises:
        ValueError: it holds none, or not those of the manifests.
    """
    if settings.vqav2_questions is None:
        return []
    ids = question_ids(settings.vqav2_questions)
    manifest_ids = [sample.id for samples in sets.values() for sample in samples if sample.task == "vqav2"]
    if strangers := set(manifest_ids) - set(map(str, ids)):
        raise ValueError(f"vqav2_questions {settings.vqav2_questions} does not hold question {min(strangers)}")
    if not manifest_ids:
        raise ValueError("vqav2_questions is set, but no manifest holds samples of vqav2")
    return ids


def check_noise(settings: EvaluationConfig) -> None:
    """Refuses to measure under the very noise that the model was trained with, unless that is allowed.

    Only a run folder knows what it was trained with; an exported model does not.

    Raises:
        ValueError: the same file, or a copy of it.
    """
    run_config = run_of(settings.model) / RUN_CONFIG
    if settings.noise is None or settings.allow_training_noise or not run_config.is_file():
        return
    trained = yaml.safe_load(run_config.read_text(encoding="utf-8")).get("data", {}).get("noise")
    if trained is None:
        return
    same_path = Path(trained).resolve() == Path(settings.noise).resolve()
    if same_path or (Path(trained).is_file() and digest_of_file(trained) == digest_of_file(settings.noise)):
        raise ValueError(
            f"noise {settings.noise} is what the model was trained with ({trained}), so errors under it would be too "
            "few; name another recording, or set allow_training_noise"
        )


def run_part(
    sweep: Sweep, work: Sequence[Work], *, rank: int = 0, num_ranks: int = 1, progress: Progress | None = None
) -> None:
    """Answers the part of one rank, telling `progress` about it."""
    total = sum(len(item.budgets) for item in work[rank::num_ranks])
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    replace(sweep, on_progress=advance).run(work, rank=rank, num_ranks=num_ranks)


def conclude(
    work: Sequence[Work],
    store: AnswerStore,
    *,
    seed: int,
    facts: Mapping[str, Any] | None = None,
    with_plot: bool = True,
    all_ids: Sequence[int] = (),
) -> Results:
    """Gathers the answers of all ranks, scores them and writes everything; for `all_ids` see `write_submissions`.

    Raises:
        RuntimeError: answers are missing, because a rank ended early.
    """
    lines = gather(work, store)
    write_text_whole(store.folder / HYPOTHESES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    results = summarise(lines, seed=seed, facts=facts)
    results.write(store.folder)
    model, limit = short_name(str(results.facts.get("model", "model"))), results.facts.get("max_new_tokens")
    speech = comparison_of(results.rows, model, max_new_tokens=limit)
    if speech is not None:
        speech.write(store.folder, with_plot=with_plot)
    report = report_of(results, lines)
    if report is not None:
        report.write(store.folder, with_plot=with_plot)
        samples = {(item.set_name, item.sample.id): item.sample for item in work}
        write_submissions(store.folder, lines, samples, all_ids=all_ids)
    others = [row for row in results.rows if row["task"] not in BENCHMARKS]
    if with_plot and others and not plot_pareto(others, store.folder / PLOT):
        logger.warning("nothing to plot: no row has both a value and soft tokens")
    return results


def gather(work: Sequence[Work], store: AnswerStore) -> list[Line]:
    """Gathers one line per sample, noise and budget of the work list, in its order.

    Raises:
        RuntimeError: some are missing.
    """
    kept = store.read()
    keys = [item.key(budget) for item in work for budget in item.budgets]
    if missing := [key for key in keys if key not in kept]:
        raise RuntimeError(
            f"{len(missing)} of {len(keys)} answers are missing, the first is {missing[0]}; run it again"
        )
    return [kept[key] for key in keys]


def _facts(settings: EvaluationConfig, config: Any) -> dict[str, Any]:
    keys = (
        *("manifest", "num_beams", "length_penalty", "max_new_tokens", "seed", "dtype", "limit", "noise"),
        *("long_audio", "window_seconds", "overlap_seconds", "audio_padding"),
    )
    values = {key: getattr(settings, key) for key in keys}
    return {"model": str(settings.model_folder), **values, **_cost_facts(config)}


def _cost_facts(config: Any) -> dict[str, Any]:
    problem = cost_problem(config)
    return {} if problem is None else {"flops": f"not told: {problem}"}
