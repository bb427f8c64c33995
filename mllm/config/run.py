"""Holds what a user writes to describe a training run: the whole of a run config.

Plain dataclasses, read from YAML, the command line and Python. Knows no torch, so that `--help` is quick.
Contradictions are refused here, before anything is loaded; every message names the key.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import yaml

from mllm.budget import MEDIA, Budget
from mllm.budget.sampler import Mode, default_num_budgets
from mllm.config.data import STREAM_FORMATS, ReaderConfig, StreamConfig
from mllm.config.model import ModelConfig, check_at_least
from mllm.config.projector import WordsConfig
from mllm.config.reading import plain, read
from mllm.media import MediaLimits

Part = Literal["compressors", "adapter", "llm", "image", "audio", "video"]


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """The features of frozen encoders, kept on disk; see training/feature_cache/features.py."""

    folder: str
    """Names the folder, which is filled before the first step; runs with the same encoders and augmentation may share
    it."""
    media: list[Literal["image", "audio", "video"]] = field(default_factory=list)
    """Keeps these media alone, such as images beside audio that is augmented anew in every epoch; the others are read
    and encoded in every epoch. All are kept when left out."""
    versions: int = 1
    """Keeps so many differently augmented versions of each sample; an epoch reads the one of its number modulo this."""
    seed: int = 0
    """Seeds their augmentation, in place of train.seed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Keeps features in this type; bfloat16 takes half the space and rounds to 3 digits."""
    pooled: list[Literal["audio", "video"]] = field(default_factory=list)
    """Keeps these media, of compressor `pool`, averaged at the largest rate all trained ones are multiples of: a
    quarter of the space for /4 and /16, and the same soft tokens."""

    def __post_init__(self) -> None:
        check_at_least(self, ["versions"], prefix="data.features.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are trained on, and how they become batches."""

    train: list[str]
    """Lists manifests (JSONL, or what data.reader.format says) to train on; media paths are relative to each manifest's
    own folder, unless `root` is given."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """Describes the form that all of these files are in."""
    stream: StreamConfig | None = None
    """Reads `train` shard by shard while the run goes on, without a scan; {} for the usual values. It names tars or
    tables, * and {000..099} standing for many, or data sets of a hub; train.max_steps says how long the run is."""
    validation: list[str] = field(default_factory=list)
    """Lists manifests to validate on; without one there is no validation."""
    captions: list[str] = field(default_factory=list)
    """Lists manifests of one medium item and its description per row. Before the first step the projectors of `pool`
    and `stack` are fitted to them in closed form, see training/initialization/projector_fit.py, and those of kind
    words learn to hear them; without one projectors start at random."""
    root: str | None = None
    """Names the folder that the media paths of all manifests are relative to, instead of each manifest's own."""
    noise: str | None = None
    """Names an audio file that is mixed into all audio, from a random point on and at one of the ratios snr_db."""
    snr_db: list[float | None] = field(default_factory=list)
    """Lists signal-to-noise ratios in decibels, of which each sample gets one; null leaves the audio as it is."""
    audio_mask_samples: list[int] = field(default_factory=list)
    """Masks audio in time, [window, stride], e.g. [6400, 16000]: in each second begun a stretch of less than 0.4
    seconds is silenced; nothing is when left out."""
    video_mask_frames: list[int] = field(default_factory=list)
    """Masks lip videos in time, [window, stride], e.g. [10, 25]: frames are black there; none are when left out."""
    flip_probability: float = 0.0
    """Mirrors so large a share of lip videos."""
    max_mismatch_seconds: float | None = 0.08
    """Refuses a clip whose audio and video differ by more; by less, the audio is cut or followed by silence. null never
    compares."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """Refuses files with more pixels, seconds or bytes, e.g. {video_seconds: 600}."""
    features: FeatureConfig | None = None
    """Encodes every training sample once, before the first step, instead of in every epoch, and every sample of
    data.validation; off when left out."""
    tokens_per_batch: int = 4096
    """Caps the tokens of one micro-batch on one process, padding included, with every medium at its largest budget."""
    max_rows: int = 64
    """Caps the samples of one micro-batch, however short they are."""
    max_sample_tokens: int | None = None
    """Cuts longer samples there, counted with every medium at its largest budget, as LLaVA cuts at 2048. Media are
    never cut: a sample with one behind this point is left out. Nothing is cut when left out."""
    group_by_media: bool = False
    """Fills every step with samples of the same media only, as many images included (but for the last ones of an
    epoch), as LLaVA parts samples with an image from those without. Then processes cost the same at small budgets too;
    see `mllm data balance`."""
    share_media: bool = False
    """Puts samples that hold the same files, such as a clip in three tasks, into one batch, where each file is read,
    augmented and encoded once, and what their prompts begin with alike is computed once. Off, every sample has
    augmentation of its own, and batches are more mixed."""
    host_answer_tokens: int | None = None
    """Lets model.host answer samples that have no answer, at its full budget and with at most so many tokens, to learn
    from that; their manifest says `"meta": {"unanswered": true}`. They are refused when left out."""
    max_unsupervised_fraction: float = 0.01
    """Refuses to start when more than this share of the samples has no target token."""
    num_workers: int = 2
    """Starts so many processes that decode media beside each training process; 0 decodes in the training process
    itself."""
    video_backend: Literal["pyav", "decord"] = "pyav"
    """Chooses what decodes videos; both give the same frames."""
    max_bad_fraction: float = 0.01
    """Stops when more than this share of the samples cannot be read; the others are listed and left out."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train is empty; name at least one manifest")
        if bool(self.snr_db) != (self.noise is not None):
            raise ValueError(f"data.noise and data.snr_db go together; got {self.noise!r} and {self.snr_db}")
        for key in ("audio_mask_samples", "video_mask_frames"):
            mask = getattr(self, key)
            if mask and (len(mask) != 2 or min(mask) < 1):
                raise ValueError(f"data.{key} is [window, stride], both above 0; got {mask}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"data.flip_probability is {self.flip_probability}; it must be in 0..1")
        check_at_least(self, ("max_mismatch_seconds", "num_workers"), 0, prefix="data.")
        counts = ("tokens_per_batch", "max_rows", "max_sample_tokens", "host_answer_tokens")
        check_at_least(self, counts, prefix="data.")
        for key in ("max_bad_fraction", "max_unsupervised_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"data.{key} is {getattr(self, key)}; it must be in 0..1, 1 left out")
        if self.stream is not None:
            self._check_stream()

    def _check_stream(self) -> None:
        """Refuse what needs to know all samples before the first step.

        Raises:
            ValueError: the first such key that is set.
        """
        if self.reader.format not in STREAM_FORMATS:
            allowed = ", ".join(STREAM_FORMATS)
            raise ValueError(f"data.stream goes with data.reader.format {allowed}, not {self.reader.format}")
        if self.features is not None:
            raise ValueError("data.features encodes all samples before the first step; leave it out with data.stream")
        for key in ("group_by_media", "share_media"):
            if getattr(self, key):
                raise ValueError(f"data.{key} needs to know all samples; leave it out with data.stream")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Which budgets a step trains."""

    mode: Mode = "random"
    """Trains every combination (`all`), random ones, the largest, the smallest and random ones between (`sandwich`), or
    the `points` listed."""
    num_budgets: int | None = None
    """Sets the budgets per step: when left out 1 of `random`, 3 of `sandwich`, all of `points`; `all` has none."""
    points: list[str] = field(default_factory=list)
    """Lists the budgets of the mode `points`, e.g. ["audio=/4,video=/2", "audio=/16,video=/5"]."""
    max_image_tokens: list[int] = field(default_factory=list)
    """Lists numbers N of `image<=N`: each random budget of `random` and `sandwich` draws one of them or none, so that a
    host sees images smaller too."""
    distill_weight: float | None = None
    """Weighs, where there is a teacher, the distance of a budget's answers to the teacher's; the rest of its loss is
    the distance to the labels. 0.5 when left out, 0 switches it off."""
    teacher: Literal["step", "frozen"] | None = None
    """Chooses the teacher: the largest budget in the same step (`step`; mode `sandwich` has it when left out), or a
    frozen copy of what trains, as train.start_from left it, at the largest budget (`frozen`; of the modes `random` and
    `all`), from which the largest budget learns too."""

    def __post_init__(self) -> None:
        if (self.mode == "points") != bool(self.points):
            raise ValueError(f"sampler.points go with sampler.mode points and only with it; mode is {self.mode!r}")
        self._check_teacher()
        if self.num_budgets is None:
            object.__setattr__(self, "num_budgets", default_num_budgets(self.mode, len(self.points)))
        if (self.mode == "sandwich" or self.has_frozen_teacher) and self.distill_weight is None:
            object.__setattr__(self, "distill_weight", 0.5)

    def _check_teacher(self) -> None:
        if self.teacher == "step" and self.mode != "sandwich":
            raise ValueError(f"sampler.teacher step goes with sampler.mode sandwich only; mode is {self.mode!r}")
        if self.has_frozen_teacher and self.mode not in ("random", "all"):
            raise ValueError(f"sampler.teacher frozen goes with sampler.mode random or all; mode is {self.mode!r}")
        if self.distill_weight is None:
            return
        if self.mode != "sandwich" and not self.has_frozen_teacher:
            raise ValueError(
                "sampler.distill_weight goes with sampler.mode sandwich or sampler.teacher frozen only; mode is "
                f"{self.mode!r}"
            )
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"sampler.distill_weight is {self.distill_weight}; it must be in 0..1")
        if self.has_frozen_teacher and self.distill_weight == 0:
            raise ValueError("sampler.distill_weight is 0, so sampler.teacher frozen would teach nobody; leave it out")

    @property
    def has_frozen_teacher(self) -> bool:
        """Tell whether all budgets learn from a frozen copy of what trains."""
        return self.teacher == "frozen"

    @property
    def distills(self) -> bool:
        """Tell whether budgets learn from a teacher."""
        return bool(self.distill_weight)

    @property
    def budgets(self) -> list[Budget]:
        """Return the points, read."""
        return [Budget.parse(point) for point in self.points]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast and how exactly a run trains, and where it is kept."""

    out: str
    """Names the folder of the run: checkpoints, logs and, at the end, the trained model."""
    max_steps: int | None = None
    """Trains so many optimizer steps; or give epochs."""
    epochs: int | None = None
    """Goes so often over the training samples, rounded up to a whole optimizer step; or give max_steps."""
    start_from: str | None = None
    """Starts from the trained values of this run folder, e.g. of a first stage or of a converted checkpoint, or from a
    LoRA in PEFT's format in this folder."""
    parts: list[Part] | None = None
    """Lists what learns, a whole part by its name; the compressors and, where there is one, the adapter when left
    out."""
    learning_rate: float = 1e-3
    """Sets the peak learning rate."""
    word_steps: int = 1000
    """Teaches projectors of kind words to hear data.captions for so many steps before the first, a micro-batch of each
    process at a time, without the LLM; see training/initialization/word_start.py."""
    word_learning_rate: float = 1e-3
    """Sets the peak learning rate of these steps."""
    word_decoder: str | None = None
    """Starts these steps for audio from what the decoder of a whole Whisper knows, a folder or a hub name: the one
    that model.audio.encoder comes from."""
    part_learning_rates: dict[Part, float] = field(default_factory=dict)
    """Sets other peak learning rates for some parts, e.g. {adapter: 2e-4}."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weighs the loss of tasks, e.g. {vsr: 1.5} as in Omni-AVSR; a task that is not named has 1."""
    sink_weight: float = 0.0
    """Weighs Llama-AVSR's sink loss, which keeps tokens from looking like the first one; there 10000, off here."""
    warmup_steps: int = 0
    """Lets the learning rate rise from 0 to its peak over so many steps; it falls to 0 at the last as a cosine."""
    warmup_fraction: float | None = None
    """Takes this share of all steps, rounded up, in place of warmup_steps, e.g. 0.03."""
    weight_decay: float = 0.0
    """Sets AdamW's weight decay of matrices; biases and norms have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Sets AdamW's decay rates of the first and second moment."""
    max_grad_norm: float = 1.0
    """Scales gradients down to this norm; 0 leaves them as they are."""
    accumulation: int = 1
    """Takes so many micro-batches per process and optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Computes in this type (autocast); trained parameters and their moments stay in float32."""
    packing: bool = True
    """Lays all passes of a micro-batch in one row without padding and computes what they share once; the same losses
    and gradients. Where the LLM's attention does not allow it, the log says so and passes are padded."""
    packed_attention: Literal["sdpa", "flex"] = "sdpa"
    """Chooses what computes the attention of packed rows: one call per stretch of a row, or flex attention, on a GPU
    only."""
    loss_kernel: Literal["torch", "liger"] = "torch"
    """Chooses what computes the cross-entropy of targets: torch from their logits, or Liger's fused kernel from those
    of a few targets at a time, on a GPU only."""
    memory: Literal["fast", "low"] = "fast"
    """Runs, when `low`, one forward and backward per budget, on features that are encoded once, instead of one for all:
    the same gradients, more time, and the activations of one budget at a time."""
    gradient_checkpointing: bool = False
    """Computes the LLM's layers again in the backward pass instead of keeping their activations."""
    seed: int = 0
    """Seeds sampled budgets, order of samples, augmentation and dropout."""
    log_every: int = 10
    """Writes a row of the log every so many steps."""
    save_every: int | None = None
    """Writes a checkpoint every so many steps; as save_minutes says, and at the end, when left out."""
    save_minutes: float | None = 10.0
    """Writes a checkpoint as well when the last one is so many minutes old, so that a crash loses no more; null never
    does."""
    keep_checkpoints: int = 2
    """Keeps so many of the newest checkpoints."""
    watchdog_minutes: float | None = 10.0
    """Ends a run in which nothing moves for so many minutes, with what every process was doing; null waits for ever."""
    validate_every: int | None = None
    """Validates every so many steps; at the end only when left out, and never without data.validation."""
    answered_samples: int = 0
    """Answers so many samples of data.validation at every validation, at each of its budgets, and logs word error rates
    and accuracies as `mllm evaluate` computes them; none when 0."""
    answer_tokens: int = 64
    """Caps the tokens of one such answer."""
    best_metric: str | None = None
    """Keeps what was trained when this figure of the validation was best, in the folder `best` of the run: loss,
    loss/audio=/4, wer, wer/asr/audio=/4, accuracy/vqa/image=16, or another that the log has."""
    best_is: Literal["auto", "lowest", "highest"] = "auto"
    """Says which value of best_metric is best; auto knows losses, error rates and accuracies."""
    early_stopping: int | None = None
    """Stops after so many validations in a row in which best_metric was no better than before."""
    overfit_batches: int | None = None
    """Trains on the first so many micro-batches again and again, to see that a model can learn them at all; `mllm train
    --overfit N` sets it."""
    tensorboard: bool = True
    """Also writes the log for tensorboard, where it is installed."""
    report_to: list[Literal["wandb", "trackio", "mlflow"]] = field(default_factory=list)
    """Also reports to these, which are set up by their own environment variables, such as WANDB_PROJECT, as in
    transformers; each must be installed."""
    progress: bool = True
    """Shows a progress bar."""
    use_cpu: bool = False
    """Trains on the CPU although there is a GPU."""
    deepspeed: str | None = None
    """Names a DeepSpeed config (JSON) for the launchers `deepspeed` and `torchrun`; `accelerate launch` brings its
    own."""

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either train.max_steps or train.epochs, and not both")
        self._check_ranges()
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"train.warmup_steps is {self.warmup_steps}, more than train.max_steps {self.max_steps}")
        if self.warmup_fraction is not None and (self.warmup_steps or not 0 <= self.warmup_fraction <= 1):
            raise ValueError(
                f"train.warmup_fraction is {self.warmup_fraction}; it must be in 0..1, without train.warmup_steps"
            )
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"train.adam_betas is {self.adam_betas}; it must be two numbers in 0..1, 1 left out")
        if self.parts is not None and not self.parts:
            raise ValueError("train.parts is empty, so nothing would learn; leave it out for the usual parts")
        if self.packed_attention == "flex" and (self.use_cpu or not self.packing):
            raise ValueError("train.packed_attention flex needs train.packing and a GPU, where its backward pass is")
        if self.overfit_batches is not None and self.epochs is not None:
            raise ValueError("train.overfit_batches goes with train.max_steps; an epoch of a few batches is none")
        if self.loss_kernel == "liger" and self.use_cpu:
            raise ValueError(
                "train.loss_kernel is liger, which needs a CUDA device, but train.use_cpu is true; use torch"
            )
        if self.memory == "low" and self.deepspeed is not None:
            raise ValueError("train.memory low does not go with train.deepspeed, which counts backward passes")

    def count_warmup_steps(self, max_steps: int) -> int:
        """Count the steps of rising learning rate in a run of so many steps."""
        return self.warmup_steps if self.warmup_fraction is None else math.ceil(self.warmup_fraction * max_steps)

    def _check_ranges(self) -> None:
        check_at_least(self, ("max_steps", "epochs", "save_every", "validate_every", "word_steps"), prefix="train.")
        check_at_least(self, ("log_every", "keep_checkpoints", "accumulation"), prefix="train.")
        check_at_least(self, ("answer_tokens", "early_stopping", "overfit_batches"), prefix="train.")
        check_at_least(self, ("answered_samples",), 0, prefix="train.")
        check_at_least(self, ("warmup_steps", "weight_decay", "max_grad_norm", "sink_weight"), 0, prefix="train.")
        for key, minutes in (("save_minutes", self.save_minutes), ("watchdog_minutes", self.watchdog_minutes)):
            if minutes is not None and not minutes > 0:
                raise ValueError(f"train.{key} is {minutes}; it must be above 0, or null")
        for task, weight in self.task_weights.items():
            if weight <= 0:
                raise ValueError(f"train.task_weights.{task} is {weight}; it must be above 0")
        for key, rate in (
            ("learning_rate", self.learning_rate),
            ("word_learning_rate", self.word_learning_rate),
            *_named_rates(self.part_learning_rates),
        ):
            if rate <= 0:
                raise ValueError(f"train.{key} is {rate}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: the model, its data, the budgets it samples, and the training."""

    model: ModelConfig
    """The parts of the model and where they come from."""
    data: DataConfig
    """The samples it is trained on."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The budgets that a step trains."""
    train: TrainConfig
    """The length, the pace and the folder of the training."""

    def __post_init__(self) -> None:
        if self.train.parts is None:
            if not self._usual_parts():
                if self.model.host is not None:
                    raise ValueError("nothing would learn: model.host stays frozen and there is no model.adapter")
                raise ValueError(
                    "nothing would learn: there is neither model.image, model.audio or model.video nor model.adapter; "
                    "give one, or name what learns in train.parts"
                )
            object.__setattr__(self, "train", replace(self.train, parts=list(self._usual_parts())))
        self._check_parts()
        self._check_padding()
        self._check_data()
        if self.train.loss_kernel == "liger" and self.sampler.distills:
            raise ValueError(
                "train.loss_kernel is liger, which gives no logits for sampler.distill_weight to compare; use torch or "
                "sampler.distill_weight 0"
            )
        self._check_frozen_teacher()
        if self.train.start_from is not None and self.data.captions:
            raise ValueError("train.start_from and data.captions both say where projectors start; give one of them")
        if self.model.dtype != "float32" and self.train.precision != self.model.dtype:
            raise ValueError(
                f"model.dtype is {self.model.dtype}, which train.precision {self.train.precision} cannot train beside; "
                "use float32, or bfloat16 for both"
            )
        for budget in self.sampler.points:
            if missing := Budget.parse(budget).media - set(self.model.media):
                raise ValueError(f"sampler.points holds {budget!r}, but model.{min(missing)} is not set")
        self._check_validation()

    def _check_validation(self) -> None:
        train = self.train
        for key in ("validate_every", "answered_samples", "best_metric"):
            if getattr(train, key) and not self.data.validation:
                raise ValueError(f"train.{key} is set, but data.validation names no manifest")
        if train.early_stopping is not None and train.best_metric is None:
            raise ValueError("train.early_stopping waits for train.best_metric, which is not set")
        if train.best_is != "auto" and train.best_metric is None:
            raise ValueError(f"train.best_is is {train.best_is}, but there is no train.best_metric")
        if train.answered_samples and self.data.features is not None:
            raise ValueError("train.answered_samples needs the encoders, which data.features leaves a run without")

    def _check_frozen_teacher(self) -> None:
        if not self.sampler.has_frozen_teacher:
            return
        if self.train.start_from is None and self.model.host is None:
            raise ValueError(
                "sampler.teacher is frozen, but an untrained model has nothing to teach: name in train.start_from the "
                "run whose answers at the largest budget are to be kept"
            )
        if "llm" in self.parts:
            raise ValueError(
                "sampler.teacher is frozen, but train.parts holds llm, of which the teacher would be a second copy in "
                "memory; leave llm out"
            )

    def _check_data(self) -> None:
        if self.data.host_answer_tokens is not None and self.model.host is None:
            raise ValueError("data.host_answer_tokens is set, but there is no model.host that could answer")
        if self.data.features is not None:
            self._check_features(self.data.features)
        if self.data.stream is not None and self.train.epochs is not None:
            raise ValueError(
                "train.epochs cannot be counted in steps with data.stream, which does not know how many samples there "
                "are; give train.max_steps"
            )
        self._check_words()

    def _check_words(self) -> None:
        """Refuse words without captions, and what is said of them where there are none."""
        blocks = self.model.encoded_media
        of_words = [medium for medium, block in blocks.items() if isinstance(block.projector, WordsConfig)]
        if of_words and not self.data.captions and self.train.start_from is None:
            raise ValueError(
                f"model.{of_words[0]}.projector is words, which are learned from data.captions; name manifests there, "
                "or a run in train.start_from"
            )
        defaults = {one.name: one.default for one in fields(TrainConfig)}
        for key in ("word_steps", "word_learning_rate", "word_decoder"):
            value = getattr(self.train, key)
            if value == defaults[key]:
                continue
            if not of_words:
                why = "no model.audio or model.video has a projector of kind words"
            elif not self.data.captions:
                why = "data.captions names no manifest"
            elif key == "word_decoder" and "audio" not in of_words:
                why = "model.audio has no projector of kind words"
            else:
                continue
            raise ValueError(f"train.{key} is {value}, but {why}")

    def _check_features(self, features: FeatureConfig) -> None:
        """Refuse features that cannot be kept, or would not be those of the run.

        Raises:
            ValueError: the first reason why.
        """
        if self.model.host is not None:
            raise ValueError("data.features does not go with model.host yet; leave it out")
        kept = self.kept_media
        for key, allowed in (("media", self.model.media), ("pooled", kept)):
            if other := sorted(set(getattr(features, key)) - set(allowed)):
                raise ValueError(f"data.features.{key} names {other[0]}; allowed: {', '.join(allowed)}")
        if learning := sorted(set(self.parts) & set(kept)):
            raise ValueError(f"data.features keeps what frozen encoders give, but train.parts holds {learning[0]}")
        for medium, block in self.model.encoded_media.items():
            if medium in kept and block.encoder is not None and block.encoder.adapter is not None:
                raise ValueError(
                    f"data.features keeps what frozen encoders give; model.{medium}.encoder.adapter is set"
                )
        has_tiles = self.model.image is not None and self.model.image.tiling is not None
        if {"image", "video"} & set(kept) and (self.model.shows_frames or has_tiles):
            raise ValueError("data.features keeps one encoding per file; leave it out with tiling and video frames")
        if len({"audio", "video"} & set(kept)) == 1 and {"audio", "video"} <= set(self.model.media):
            raise ValueError(
                f"data.features.media is {list(kept)}; audio and video of one clip are brought to one length, so keep "
                "both or neither"
            )

    def _check_padding(self) -> None:
        """Refuse an encoder of audio that was trained on whole windows, hears clips alone, and does not learn to.

        Raises:
            ValueError: it does.
        """
        encoder = None if self.model.audio is None else self.model.audio.encoder
        if encoder is None or encoder.padding == "window" or encoder.untrained_padding:
            return
        if encoder.adapter is None and "audio" not in self.parts:
            raise ValueError(
                "model.audio.encoder.padding is none, and the encoder stays frozen, while published weights were "
                "trained on whole windows: give it an adapter (model.audio.encoder.adapter), train it (train.parts "
                "with audio) or, where it was trained so or may hear worse, set "
                "model.audio.encoder.untrained_padding"
            )

    def _check_parts(self) -> None:
        for part in self.parts if self.model.host is not None else ():
            if part != "adapter":
                raise ValueError(f"train.parts holds {part}, but the parts of model.host stay frozen; allowed: adapter")
        for part in self.parts:
            if part == "adapter" and not self.model.has_adapter:
                raise ValueError("train.parts holds adapter, but model.adapter is not set")
            if part in MEDIA and part not in self.model.media:
                raise ValueError(f"train.parts holds {part}, but model.{part} is not set")
            if part == "llm" and self.model.quantization is not None:
                raise ValueError("train.parts holds llm, but weights of model.quantization do not train; leave one out")
        if idle := set(self.train.part_learning_rates) - set(self.parts):
            raise ValueError(f"train.part_learning_rates names {min(idle)}, which is not among train.parts")
        if self.model.has_adapter and "adapter" not in self.parts:
            raise ValueError("model.adapter is set, but train.parts leaves it out; it would never learn")

    def _usual_parts(self) -> tuple[Part, ...]:
        # A host's features are pooled without weights.
        compressors: tuple[Part, ...] = ("compressors",) if self.model.media and self.model.host is None else ()
        return (*compressors, "adapter") if self.model.has_adapter else compressors

    @property
    def kept_media(self) -> tuple[str, ...]:
        """Return the media whose features are kept; none without data.features."""
        if self.data.features is None:
            return ()
        return tuple(m for m in self.model.media if m in (self.data.features.media or self.model.media))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return what learns, each part once."""
        return tuple(dict.fromkeys(self.train.parts or ()))


def read_run_config(values: Any) -> RunConfig:
    """Read a run config from plain values, such as those of a YAML file or a Python dict.

    Raises:
        ValueError: an unknown key, a value of another type, or a contradiction; the key is named.
    """
    return read(RunConfig, values)


def config_yaml(config: RunConfig) -> str:
    """Return a config with every default filled in, as YAML that starts the same run again.

    A key that is left out of it has no value: no tiles, no limit, no checkpoint before the last.
    """
    return yaml.safe_dump(_without_auto(plain(config)), sort_keys=False, allow_unicode=True)


def _without_auto(values: Any) -> Any:
    """Leave out what is still "auto" in a resolved config: it concerns other parts than those in use."""
    if not isinstance(values, Mapping):
        return values
    return {key: _without_auto(value) for key, value in values.items() if value != "auto"}


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the keys at which two nested configs differ, with both values."""
    changed = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return changed


def _named_rates(rates: dict[Part, float]) -> list[tuple[str, float]]:
    return [(f"part_learning_rates.{part}", rate) for part, rate in rates.items()]


assert set(MEDIA) < set(get_args(Part))
