"""A training run from its settings to its folder: launch, look at the data, build, train, save.

Knows the order of things and the files of a run. Does not know how any of it is done.

    runs/demo/  settings.yaml  config.json  trainables.safetensors  tokenizer files   what was trained, and how
                checkpoint-00000500/ ...   log.jsonl   tensorboard/   skipped-0.jsonl   survey/
                experts.jsonl   experts.png   where the adapter has experts
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from mllm.budget import Budget
from mllm.budget.sampler import Sampler
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load_trainables, save_run
from mllm.checkpoints.sources import find_parts, identities, resolve_source, seen_from
from mllm.config.model import ModelConfig
from mllm.config.run import RunConfig, settings_yaml
from mllm.data.dataset import ManifestDataset
from mllm.data.shared_media import samples_that_share
from mllm.model.precision import keep_in_float32
from mllm.model.trainables import is_sharded, set_trainables
from mllm.processing.processor import ElasticProcessor
from mllm.training.arguments import ElasticArguments, build_arguments
from mllm.training.checkpoint import TRAINABLES, check_continues, choose_checkpoint, set_aside_refused
from mllm.training.experts import COUNTS, PLOT, draw_experts, read_counts
from mllm.training.feature_cache.building import FeatureSamples, Stores, filled_stores
from mllm.training.feature_cache.features import FeatureDataset, pass_features_through
from mllm.training.initialization.projector_fit import fit_projectors
from mllm.training.initialization.start_from import start_from
from mllm.training.interruption import StopWhenAsked, stopping_on_interrupt
from mllm.training.pipeline.data_look import LookedOver, build_sampler, look_over
from mllm.training.pipeline.loaders import encode, loading, train_loader, validation_loader
from mllm.training.run_folder import Checkpoint, remove_leftovers, run_lock
from mllm.training.throughput import Stopwatch
from mllm.training.trainer import ElasticTrainer, Metric, Validation
from mllm.utils.distributed import check_process_count, prepare_launch
from mllm.utils.run_paths import CONFIG, SETTINGS, run_of

logger = logging.getLogger(__name__)


def train(
    settings: RunConfig,
    *,
    resume: str | None = None,
    sources: Mapping[str, str] | None = None,
    metric: Metric | None = None,
) -> Path:
    """Train a run; every process of a launcher calls this.

    Args:
        resume: nothing for a fresh start, `auto` for the newest complete checkpoint, or the folder of one.
        sources: with resume, where frozen parts are now, by part, if they were moved.
        metric: measures answers at each validation, by name.

    Returns:
        The run folder, which `mllm.load` reads.

    Raises:
        ValueError: what a user can cause; the message names the key.
        FloatingPointError: the loss or the gradient is no longer a number.
        KeyboardInterrupt: the user interrupted it; see `interruption.py`.
    """
    if metric is not None and settings.data.features is not None:
        raise ValueError("metric measures answers, for which data.features leaves the run no encoders; leave one out")
    on_cpu = prepare_launch(use_cpu=settings.train.use_cpu, deepspeed=settings.train.deepspeed is not None)
    arguments = build_arguments(settings, on_cpu=on_cpu)  # before the model: ZeRO-3 shards weights while they load
    check_process_count(arguments.world_size)
    with _own_run(arguments.run):
        start = _start(arguments.run, resume)
        found = _with_parts_found(settings.model, start, sources or {})
        looked = look_over(dataclasses.replace(settings, model=found), arguments.run, fits_captions=start is None)
        model, processor = build(found, limits=settings.data.limits)
        model.config.sources = _sources_of(settings.model, model.config.sources or {}, arguments.run)
        names = set_trainables(model, settings.parts)
        keep_in_float32(parameter for parameter in model.parameters() if parameter.requires_grad)
        arguments.facts = {"settings": dataclasses.asdict(settings), "sources": identities(model.config.sources or {})}
        if start is not None:
            check_continues(start.facts, {**arguments.facts, "processes": arguments.world_size})
        if arguments.should_save:
            (arguments.run / SETTINGS).write_text(settings_yaml(settings), encoding="utf-8")
            processor.save_pretrained(arguments.run)  # now: the checkpoints of a run that dies can be used with it
        if settings.train.start_from is not None and start is None:
            start_from(model, settings.train.start_from)
        trainer = build_trainer(settings, arguments, model, processor, looked, metric=metric)
        if start is not None and start.step >= arguments.max_steps:
            logger.info("%s is the last step already; nothing is trained", start.folder)
            load_trainables(model, start.folder / TRAINABLES, names)
        else:
            _fit(trainer, start)
        trainables = trainer.trainables()
        if arguments.should_save:
            save_run(model, processor, arguments.run, state=trainables)
            if (counts := arguments.run / COUNTS).exists():
                draw_experts(read_counts(counts), arguments.run / PLOT)
        PartialState().wait_for_everyone()
    return arguments.run


def _fit(trainer: ElasticTrainer, start: Checkpoint | None) -> None:
    """Train to the last step.

    Raises:
        KeyboardInterrupt: it was interrupted before that; with one process, there is a checkpoint of the step.
    """
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    with stopping_on_interrupt(stop, num_processes=trainer.args.world_size):
        trainer.train(resume_from_checkpoint=None if start is None else str(start.folder))
    if stop.asked and trainer.state.global_step < trainer.args.max_steps:
        raise KeyboardInterrupt


def build_trainer(
    settings: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    looked: LookedOver,
    *,
    metric: Metric | None = None,
) -> ElasticTrainer:
    """The trainer of a run whose data have been looked over: its projectors fitted to captions, its batches, its draws,
    its validation.
    """
    run, data, draws = arguments.run, settings.data, build_sampler(settings, processor.space)
    samples, surveyed = looked.samples["train"], looked.surveys["train"]
    watch, stores = Stopwatch(), None
    groups = samples_that_share(samples) if data.share_media else None
    fits = "captions" in looked.samples  # not in a resumed run
    if fits:
        _check_fits(settings, model)
    if data.features is None:
        load = loading(data, processor, augmented=True, budgets=extremes(draws), watch=watch)
        rows = ManifestDataset(samples, load=load, seed=settings.train.seed, groups=groups)
    else:
        stores = _features(settings, arguments, model, processor, looked.for_features())
        rows = FeatureDataset(samples, stores.train, watch, groups=groups)
    if fits:
        _fit_projectors(settings, arguments, model, processor, looked, stores)
    encoded = partial(encode, processor=processor, budgets=extremes(draws), watch=watch)
    batches = train_loader(
        rows,
        surveyed,
        settings=data,
        encode=partial(encoded, max_sample_tokens=data.max_sample_tokens),
        run=run,
        seed=settings.train.seed,
        lanes={
            "process_index": arguments.process_index,
            "num_processes": arguments.world_size,
            "accumulation": settings.train.accumulation,
        },
    )
    if settings.train.epochs is not None:
        arguments.max_steps = batches.batch_sampler.steps(settings.train.epochs)  # type: ignore[union-attr]
        arguments.warmup_steps = settings.train.count_warmup_steps(arguments.max_steps)
    trainer = ElasticTrainer(
        model,
        arguments,
        processor=processor,
        sampler=draws,
        batches=batches,
        validation=_validation(settings, arguments, processor, looked, stores, metric) if data.validation else None,
        tensorboard=settings.train.tensorboard,
    )
    check_process_count(trainer.accelerator.num_processes)
    if settings.train.gradient_checkpointing:
        trainer.checkpoint_activations()
    return trainer


def _features(
    settings: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    samples: FeatureSamples,
) -> Stores:
    """The features of the samples, made by all processes; the model's encoders are gone afterwards."""
    if is_sharded(model):
        raise ValueError("data.features cannot be made under ZeRO-3, which keeps no encoder whole; use ZeRO-2")
    ranks = {"rank": arguments.process_index, "num_ranks": arguments.world_size}
    with tqdm(desc="encoding", disable=not settings.train.progress or arguments.process_index > 0) as bar:

        def note(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model.to(arguments.device)
        stores = filled_stores(settings, model, processor, samples, **ranks, progress=note)
    PartialState().wait_for_everyone()
    stores.read_indices()
    pass_features_through(model, stores.form.pooled)
    return stores


def extremes(draws: Sampler) -> list[Budget]:
    """Budgets that a sample must meet so that it meets whatever is drawn."""
    largest, smallest = draws.space.largest(), draws.space.smallest()
    between = [dataclasses.replace(largest, num_frames=count) for count in draws.space.frame_counts[1:-1]]
    return list(draws.points) or [largest, *between, smallest]


def _validation(
    settings: RunConfig,
    arguments: ElasticArguments,
    processor: ElasticProcessor,
    looked: LookedOver,
    stores: Stores | None,
    metric: Metric | None,
) -> Validation:
    data = settings.data
    asked = [Budget.parse(text) for text in settings.train.validation_budgets]
    budgets = asked or extremes(build_sampler(settings, processor.space))
    samples = looked.samples["validation"]
    if stores is None:
        rows = ManifestDataset(samples, load=loading(data, processor, augmented=False, budgets=budgets))
    else:
        assert stores.validation is not None
        rows = FeatureDataset(samples, stores.validation)
    batches, own = validation_loader(
        rows,
        looked.surveys["validation"],
        settings=data,
        processor=processor,
        budgets=budgets,
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
    )
    return Validation(batches, own, budgets, metric)


def _check_fits(settings: RunConfig, model: Any) -> None:
    """Raises: ValueError where projectors cannot be fitted to captions."""
    if "compressors" not in settings.parts:
        raise ValueError(f"data.captions fits projectors, but train.parts {list(settings.parts)} keeps them frozen")
    if is_sharded(model):
        raise ValueError("data.captions cannot be fitted under ZeRO-3, which keeps no projector whole; use ZeRO-2")


def _fit_projectors(
    settings: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    looked: LookedOver,
    stores: Stores | None,
) -> None:
    """Start the projectors at what captions say; see `projector_fit.py`."""
    samples = looked.samples["captions"]
    if stores is None:
        rows = ManifestDataset(samples, load=loading(settings.data, processor, augmented=False))
    else:
        rows = FeatureDataset(samples, stores.train)
    batches, own = validation_loader(
        rows,
        looked.surveys["captions"],
        settings=settings.data,
        processor=processor,
        budgets=[],
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
    )
    fit_projectors(model.to(arguments.device), processor, batches, own=own)


@contextlib.contextmanager
def _own_run(run: Path) -> Iterator[None]:
    """Hold the run folder, by the main process for all, and tidy what a kill left in it."""
    if not PartialState().is_main_process:
        yield
        return
    with run_lock(run):
        remove_leftovers(run)
        yield


def _with_parts_found(own: ModelConfig, start: Checkpoint | None, sources: Mapping[str, str]) -> ModelConfig:
    """The model of a run that goes on, with its frozen parts where they are now.

    Raises:
        ValueError: sources without a run to go on with, or a part that the model has not.
        FileNotFoundError: a part that is neither where the settings say nor where it was.
    """
    if start is None:
        if sources:
            raise ValueError("sources goes with resume; a fresh run takes its parts from model.llm and the encoders")
        return own
    lost = {p: named for p, named in own.sources.items() if not Path(resolve_source(named)).is_dir()} | dict(sources)
    known = json.loads((start.folder / CONFIG).read_text(encoding="utf-8")).get("sources") or {}
    waiting = {p: known[p] for p in lost if p in known and (p in sources or known[p]["reference"] == lost[p])}
    found = find_parts(waiting, run_of(start.folder), sources)
    return own.with_sources({part: one["reference"] for part, one in found.items()})


def _sources_of(own: ModelConfig, sources: Mapping[str, Mapping[str, str]], run: Path) -> dict[str, dict[str, str]]:
    """Where the parts of a model are, under the names that the settings give them and as seen from the run."""
    named = own.sources
    return seen_from({part: {**one, "reference": named[part]} for part, one in sources.items()}, run)


def _start(run: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to start from, the same on every process."""
    start = choose_checkpoint(run, resume)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        set_aside_refused(run, start)
    PartialState().wait_for_everyone()
    return start
