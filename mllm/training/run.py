"""Trains a run from its config to its folder: launch, load the data, build the model, train, save.

Knows the order of things and the files of a run. Does not know how any of it is done.

    runs/demo/  settings.yaml  config.json  trainables.safetensors  tokenizer files   what was trained, and how
                checkpoint-00000500/ ...   log.jsonl   tensorboard/   skipped-0.jsonl   token_scan/   stream/
                experts.jsonl   experts.png   where the adapter has experts
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from torch.utils.data import DataLoader

from mllm.budget import Budget
from mllm.checkpoints.auto_classes import register
from mllm.checkpoints.build import build, resolved
from mllm.checkpoints.load import load_trainables, save_processor, save_run
from mllm.checkpoints.sources import find_parts, identities, is_part, resolve_source, seen_from
from mllm.config.model import ModelConfig
from mllm.config.run import DataConfig, RunConfig, config_yaml, read_run_config
from mllm.data.dataset import ManifestDataset
from mllm.data.manifest import Sample
from mllm.data.shared_media import samples_that_share
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import keep_in_float32
from mllm.model.trainables import held_names, saved_names, set_trainables, trains_in_shards
from mllm.processing.processor import ElasticProcessor
from mllm.training.arguments import ElasticArguments, build_arguments
from mllm.training.checkpoint import TRAINABLES, check_continues, choose_checkpoint, set_aside_refused
from mllm.training.experts import COUNTS, PLOT, plot_experts, read_counts
from mllm.training.feature_cache.building import FeatureSamples, Stores, filled_stores
from mllm.training.feature_cache.features import FeatureDataset, pass_features_through
from mllm.training.feature_cache.store import FeatureStore
from mllm.training.initialization.captions import check_captions
from mllm.training.initialization.projector_fit import fit_projectors
from mllm.training.initialization.start_from import start_from
from mllm.training.initialization.word_decoder import WordDecoder, read_word_decoder
from mllm.training.initialization.word_start import WordLessons, teach_words, word_media
from mllm.training.interruption import RunInterrupted, StopRequest, stopping_on_signals
from mllm.training.llm_shards import mesh_of_all, shard_llm
from mllm.training.memory import tell_memory
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.dataset import TrainingData, build_sampler, extreme_budgets, load_dataset
from mllm.training.pipeline.loaders import encode, loading, train_loader, validation_loader
from mllm.training.pipeline.stream import stream_batches, stream_loader
from mllm.training.pipeline.token_scan import TokenScan
from mllm.training.progress import reporting
from mllm.training.run_folder import Checkpoint, delete_old, remove_leftovers, run_lock
from mllm.training.throughput import Stopwatch
from mllm.training.trainer import ElasticTrainer, Metric, Validation
from mllm.training.watchdog import remove_reports, watched
from mllm.utils.broken_packages import hide_broken_deepspeed
from mllm.utils.distributed import check_process_count, in_turn, prepare_launch, take_fsdp2
from mllm.utils.files import write_text_whole
from mllm.utils.registry import load_plugins
from mllm.utils.run_paths import CONFIG, RUN_CONFIG, run_of

logger = logging.getLogger(__name__)


def read_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """Read a run config: an object as it is, plain values, or the path of a YAML file.

    Raises:
        ValueError: an unknown key, a value of another type, or a contradiction; the key is named.
        OSError: the file cannot be read.
    """
    load_plugins()  # what they add may be named in a config
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return read_run_config(config)
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{config} holds no keys; a run config has the blocks model, data and train")
    return read_run_config(values)


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: str | None = None,
    sources: Mapping[str, str] | None = None,
    metric: Metric | None = None,
) -> Path:
    """Train a run; every process of a launcher calls this.

    Args:
        config: a run config, plain values, or the path of a YAML file.
        resume: None for a fresh start, `auto` for the newest complete checkpoint, or the folder of one.
        sources: with resume, where frozen parts are now, by part, if they were moved.
        metric: measures answers at each validation, by name.

    Returns:
        The run folder, which `mllm.load` reads.

    Raises:
        ValueError: what a user can cause; the message names the key.
        FloatingPointError: the loss or the gradient is no longer a number.
        RunInterrupted: a signal ended it, behind a saved step; a KeyboardInterrupt, see `interruption.py`.
    """
    register()
    config = read_config(config)
    if metric is not None and config.data.features is not None:
        raise ValueError("metric measures answers, for which data.features leaves the run no encoders; leave one out")
    if config.train.answered_samples and metric is None:
        raise ValueError(
            "train.answered_samples needs what scores answers: start the run by mllm.train or `mllm train`"
        )
    with stopping_on_signals(request := StopRequest()):
        arguments = launch(config)  # before the model: ZeRO-3 shards weights while they load
        with _locked(arguments.run):
            start = _checkpoint_to_start_from(arguments.run, resume)
            trainer = _prepare(config, arguments, start, sources=sources or {}, metric=metric)
            if start is not None and start.step >= arguments.max_steps:
                logger.info("%s is the last step already; nothing is trained", start.folder)
                if arguments.should_save:  # a kill behind the last checkpoint may have left one too many
                    delete_old(arguments.run, config.train.keep_checkpoints)
                load_trainables(trainer.elastic, start.folder / TRAINABLES, saved_names(trainer.elastic))
            else:
                _fit(trainer, start, request)
            save(trainer)
    return arguments.run


def _prepare(
    config: RunConfig,
    arguments: ElasticArguments,
    start: Checkpoint | None,
    *,
    sources: Mapping[str, str],
    metric: Metric | None,
) -> ElasticTrainer:
    """Load the data and build the model and the trainer of a run, and write what its checkpoints need to be used."""
    model_config = _with_parts_located(config.model, start, sources)
    # What is compared with a checkpoint and written to settings.yaml has a value for every key.
    config = dataclasses.replace(config, model=resolved(model_config).with_sources(config.model.sources))
    located = dataclasses.replace(config, model=model_config)
    commits = None if start is None else start.facts.get("shards", {}).get("commits")
    data = load_dataset(located, fits_captions=start is None, commits=commits)
    model, processor = _build_model(located, arguments)
    model.config.sources = _sources_of(config.model, model.config.sources or {}, arguments.run)
    if not trains_in_shards(model):
        tell_memory(model, arguments.device)
    if start is not None:
        check_continues(start.facts, {**_facts(config, model, data), "processes": arguments.world_size})
    if arguments.should_save:
        write_text_whole(arguments.run / RUN_CONFIG, config_yaml(config))
        save_processor(processor, arguments.run)  # now: the checkpoints of a run that dies can be used with it
    if config.train.start_from is not None and start is None:
        start_from(model, config.train.start_from)
    start_step = 0 if start is None else start.step
    return build_trainer(config, model, processor, data, arguments=arguments, metric=metric, start_step=start_step)


def launch(config: RunConfig) -> ElasticArguments:
    """Make the processes of a launcher one training, and its trainer's arguments; call it before any model is made.

    Raises:
        ValueError: processes that did not find each other, a loss kernel or DeepSpeed that cannot run here, or FSDP as
            a run has none.
    """
    shards_llm = take_fsdp2()
    on_cpu = prepare_launch(use_cpu=config.train.use_cpu, deepspeed=config.train.deepspeed is not None)
    hide_broken_deepspeed()
    arguments = build_arguments(config, on_cpu=on_cpu, shards_llm=shards_llm)
    check_process_count(arguments.world_size)
    return arguments


def build_model(config: RunConfig) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build the model and processor of a run: frozen parts, new compressors and adapter; what learns is set.

    Raises:
        ValueError: parts that do not fit together; the key is named.
        OSError: a part that cannot be read.
    """
    model, processor = build(config.model, limits=config.data.limits)
    saved = set(set_trainables(model, config.parts))
    keep_in_float32(parameter for name, parameter in model.named_parameters() if name in saved)
    return model, processor


def _build_model(
    config: RunConfig, arguments: ElasticArguments
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build the model and processor; where the LLM is sharded, no two processes of a machine ever hold it whole."""
    if not arguments.shards_llm:
        return build_model(config)
    mesh = mesh_of_all(arguments.device)
    with in_turn():
        model, processor = build_model(config)
        shard_llm(model, arguments.device, mesh)
    return model, processor


def save(trainer: ElasticTrainer) -> None:
    """Write what a trainer has trained to its run folder, so that `mllm.load` reads it; every process calls this."""
    run, trainables = trainer.args.run, trainer.trainables()
    if trainer.args.should_save:
        save_run(trainer.elastic, trainer.processor, run, state=trainables)
        if (run / COUNTS).exists():
            plot_experts(read_counts(run / COUNTS), run / PLOT)
    PartialState().wait_for_everyone()


def _fit(trainer: ElasticTrainer, start: Checkpoint | None, request: StopRequest) -> None:
    """Train to the last step, watched.

    Raises:
        RunInterrupted: a signal ended it before that; there is a checkpoint of the step.
    """
    trainer.stop.request, args = request, trainer.args
    request.is_training = True
    with watched(args.run, rank=args.process_index, minutes=args.watchdog_minutes):
        trainer.train(resume_from_checkpoint=None if start is None else str(start.folder))
    request.is_training = False
    if request.agreed_number and trainer.state.global_step < args.max_steps:
        raise RunInterrupted(request.agreed_number, is_agreed=True)


def build_trainer(
    config: RunConfig,
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    data: TrainingData,
    *,
    arguments: ElasticArguments | None = None,
    metric: Metric | None = None,
    start_step: int = 0,
) -> ElasticTrainer:
    """Build the trainer of a run: fit its projectors to captions, make its batches, budgets and validation.

    Args:
        model: of `build_model`.
        data: of `load_dataset`.
        arguments: of `launch`; made when left out.
        metric: measures answers at each validation, by name.
        start_step: the step that it goes on from.
    """
    arguments = arguments or launch(config)
    arguments.facts = _facts(config, model, data)
    sampler = build_sampler(config, processor.space)
    fits = "captions" in data.samples  # neither in a resumed run nor in a dry one
    if fits and trains_in_shards(model):
        raise ValueError("data.captions cannot be fitted under ZeRO-3, which keeps no projector whole; use ZeRO-2")
    if trains_in_shards(model) and held_names(model):
        raise ValueError(
            "the words of a projector cannot be held under ZeRO-3, which keeps no projector whole; use ZeRO-2"
        )
    # Before features, which take long: a decoder that cannot be had ends the run at once.
    decoder = _decoder(config) if fits else None
    stores = None
    if config.data.features is not None:
        stores = _feature_stores(config, arguments, model, processor, data.for_features())
    if fits:
        _fit_projectors(config, arguments, model, processor, data, stores, decoder)
    batches = _train_batches(config, arguments, processor, data, stores, start_step=start_step)
    if config.train.epochs is not None:
        arguments.max_steps = batches.batch_sampler.steps(config.train.epochs)  # type: ignore[union-attr]
        arguments.warmup_steps = config.train.count_warmup_steps(arguments.max_steps)
    trainer = ElasticTrainer(
        model,
        arguments,
        processor=processor,
        sampler=sampler,
        batches=batches,
        validation=_validation(config, arguments, processor, data, stores, metric) if config.data.validation else None,
        tensorboard=config.train.tensorboard,
    )
    check_process_count(trainer.accelerator.num_processes)
    if config.train.gradient_checkpointing:
        trainer.checkpoint_activations()
    return trainer


def _train_batches(
    config: RunConfig,
    arguments: ElasticArguments,
    processor: ElasticProcessor,
    data: TrainingData,
    stores: Stores | None,
    *,
    start_step: int,
) -> DataLoader[Any]:
    """Make the loader of this process's micro-batches: of samples, of their features, or of a stream."""
    watch, slots, seed = Stopwatch(), _slots(arguments), config.train.seed
    budgets = extreme_budgets(build_sampler(config, processor.space))
    load = loading(config.data, processor, augmented=True, budgets=budgets, watch=watch)
    encoding = _encoding(config.data, processor, budgets, watch)
    if data.shards is not None:
        chosen = stream_batches(
            data.shards, processor, config=config, run=arguments.run, slots=slots, start_step=start_step
        )
        return stream_loader(chosen, load=load, encode=encoding, config=config.data, run=arguments.run)
    samples = data.samples["train"]
    groups = samples_that_share(samples) if config.data.share_media else None
    if stores is None:
        dataset = ManifestDataset(samples, load=load, seed=seed, groups=groups)
    else:
        dataset = FeatureDataset(
            samples, stores.train, watch, kept=config.kept_media, load=load, seed=seed, groups=groups
        )
    return train_loader(
        dataset,
        data.scans["train"],
        config=config.data,
        encode=encoding,
        run=arguments.run,
        seed=seed,
        slots=slots,
        num_repeated=config.train.overfit_batches,
    )


def _encoding(
    data: DataConfig, processor: ElasticProcessor, budgets: Sequence[Budget], watch: Stopwatch
) -> Callable[..., dict[str, Any]]:
    """Make what encodes samples and their media to a micro-batch, and takes its time."""
    return partial(encode, processor=processor, budgets=budgets, watch=watch, max_sample_tokens=data.max_sample_tokens)


def _facts(config: RunConfig, model: ElasticForConditionalGeneration, data: TrainingData) -> dict[str, Any]:
    """Describe what a checkpoint's run was, so that another one is not taken for its continuation."""
    facts = {"settings": dataclasses.asdict(config), "sources": identities(model.config.sources or {})}
    return facts if data.shards is None else {**facts, "shards": data.shards.facts()}


def _slots(arguments: ElasticArguments) -> RankSlots:
    return RankSlots(arguments.process_index, arguments.world_size, arguments.gradient_accumulation_steps)


def _feature_stores(
    config: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    samples: FeatureSamples,
) -> Stores:
    """Make the features of the samples, by all processes; the model's encoders are gone afterwards."""
    if trains_in_shards(model):
        raise ValueError("data.features cannot be made under ZeRO-3, which keeps no encoder whole; use ZeRO-2")
    rank, num_ranks = arguments.process_index, arguments.world_size
    with _reporting("encoding", arguments) as report:
        model.to(arguments.device)
        stores = filled_stores(config, model, processor, samples, rank=rank, num_ranks=num_ranks, progress=report)
    PartialState().wait_for_everyone()
    stores.read_indices()
    pass_features_through(model, config.kept_media, stores.form.pooled)
    return stores


def _validation(
    config: RunConfig,
    arguments: ElasticArguments,
    processor: ElasticProcessor,
    data: TrainingData,
    stores: Stores | None,
    metric: Metric | None,
) -> Validation:
    budgets = extreme_budgets(build_sampler(config, processor.space))
    dataset = _clean(
        config, processor, data.samples["validation"], None if stores is None else stores.validation, budgets
    )
    batches, num_counted = validation_loader(
        dataset,
        data.scans["validation"],
        config=config.data,
        processor=processor,
        budgets=budgets,
        slots=_slots(arguments),
    )
    return Validation(batches, num_counted, budgets, metric)


def _clean(
    config: RunConfig,
    processor: ElasticProcessor,
    samples: Sequence[Sample],
    store: FeatureStore | None,
    budgets: Sequence[Budget] = (),
) -> ManifestDataset:
    """Make a data set that is not augmented, of files or of kept features."""
    load = loading(config.data, processor, augmented=False, budgets=budgets)
    if store is None:
        return ManifestDataset(samples, load=load)
    return FeatureDataset(samples, store, kept=config.kept_media, load=load)


def _reporting(what: str, arguments: ElasticArguments) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """Show a bar of work that goes on before the first step, on the first process."""
    return reporting(what, is_shown=not arguments.disable_tqdm and arguments.process_index == 0)


def _decoder(config: RunConfig) -> WordDecoder | None:
    return None if config.train.word_decoder is None else read_word_decoder(config.train.word_decoder)


def try_captions(
    config: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    data: TrainingData,
) -> None:
    """Begin what the captions of a run start, as a dry run does: one step of words, and no fit, but its first batch.

    Raises:
        ValueError: what would stop the run here, among all captions for words, in one batch of them for the fit.
        OSError: a decoder that cannot be read.
    """
    dataset = _clean(config, processor, data.samples["captions"], None)
    if of_words := word_media(model):
        once = dataclasses.replace(config, train=dataclasses.replace(config.train, word_steps=1))
        model, scan = model.to(arguments.device), data.scans["captions"]
        _teach_words(once, arguments, model, processor, dataset, scan, _decoder(config))
    if _fits_others(data.samples["captions"], of_words):
        batches, _ = _caption_batches(config, arguments, processor, dataset, data.scans["captions"])
        check_captions(next(iter(batches))["batch"])


def _fits_others(samples: Sequence[Sample], of_words: Sequence[str]) -> bool:
    """Whether captions are of a medium whose projector is fitted to them, in place of learning words."""
    return bool({part.medium for sample in samples for part in sample.media} - set(of_words))


def _caption_batches(
    config: RunConfig,
    arguments: ElasticArguments,
    processor: ElasticProcessor,
    dataset: ManifestDataset,
    scan: TokenScan,
) -> tuple[DataLoader[Any], int]:
    """Make the loader of this process's captions, clean and in order, and say how many of its batches count."""
    return validation_loader(
        dataset, scan, config=config.data, processor=processor, budgets=[], slots=_slots(arguments)
    )


def _fit_projectors(
    config: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    data: TrainingData,
    stores: Stores | None,
    decoder: WordDecoder | None,
) -> None:
    """Start the projectors at what captions say; see `mllm.training.initialization`."""
    samples, model = data.samples["captions"], model.to(arguments.device)
    dataset = _clean(config, processor, samples, None if stores is None else stores.train)
    if of_words := word_media(model):
        _teach_words(config, arguments, model, processor, dataset, data.scans["captions"], decoder)
    if not _fits_others(samples, of_words):
        return
    batches, num_counted = _caption_batches(config, arguments, processor, dataset, data.scans["captions"])
    with _reporting("reading captions", arguments) as report:
        fit_projectors(model, processor, batches, num_counted=num_counted, progress=report)


def _teach_words(
    config: RunConfig,
    arguments: ElasticArguments,
    model: Any,
    processor: ElasticProcessor,
    dataset: ManifestDataset,
    scan: TokenScan,
    decoder: WordDecoder | None,
) -> None:
    """Let word projectors learn to hear; see `mllm.training.initialization.word_start`."""
    batches = train_loader(
        dataset,
        scan,
        config=dataclasses.replace(config.data, max_bad_fraction=0.0),
        encode=_encoding(config.data, processor, [], Stopwatch()),
        run=arguments.run,
        seed=config.train.seed,
        slots=_slots(arguments),
    )
    lessons = WordLessons(
        num_steps=config.train.word_steps,
        learning_rate=config.train.word_learning_rate,
        seed=config.train.seed,
        decoder=decoder,
    )
    with _reporting("learning words", arguments) as report:
        teach_words(
            model,
            processor,
            dataset.samples,
            batches,
            lessons=lessons,
            progress=report,
        )


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder, by the main process for all, and tidy what a kill left in it."""
    if not PartialState().is_main_process:
        yield
        return
    with run_lock(run):
        remove_leftovers(run)
        remove_reports(run)
        yield


def _with_parts_located(config: ModelConfig, start: Checkpoint | None, sources: Mapping[str, str]) -> ModelConfig:
    """Name the frozen parts of a run that goes on where they are now.

    Raises:
        ValueError: sources without a run to go on with, or a part that the model has not.
        FileNotFoundError: a part that is neither where the config says nor where it was.
    """
    if start is None:
        if sources:
            raise ValueError("sources goes with resume; a fresh run takes its parts from model.llm and the encoders")
        return config
    lost = {part: name for part, name in config.sources.items() if not is_part(resolve_source(name))}
    lost |= dict(sources)
    known = json.loads((start.folder / CONFIG).read_text(encoding="utf-8")).get("sources") or {}
    searched = {
        part: known[part]
        for part in lost
        if part in known and (part in sources or known[part]["reference"] == lost[part])
    }
    located = find_parts(searched, run_of(start.folder), sources)
    return config.with_sources({part: source["reference"] for part, source in located.items()})


def _sources_of(config: ModelConfig, sources: Mapping[str, Mapping[str, str]], run: Path) -> dict[str, dict[str, str]]:
    """Say where the parts of a model are, under the names that the config gives them and as seen from the run."""
    names = config.sources
    return seen_from({part: {**source, "reference": names[part]} for part, source in sources.items()}, run)


def _checkpoint_to_start_from(run: Path, resume: str | None) -> Checkpoint | None:
    """Choose the checkpoint to start from, the same on every process."""
    start = choose_checkpoint(run, resume)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        set_aside_refused(run, start)
    PartialState().wait_for_everyone()
    return start
