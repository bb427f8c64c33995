"""Lets a frozen copy of what trains answer at the largest budget, so that all budgets of the model stay close to it.

Knows the model, its trainables and batches. Does not know the optimizer or how budgets are sampled.

The copy has what trains and nothing else: the frozen LLM and encoders are those of the model, run with the copied
values in place of the trained ones, so there is no second LLM in memory. Its answers are those that the run began with
at the largest budget, whatever has been learned since; the teacher in the same step (`sampler.mode: sandwich`) moves
along with its students, and its own budget learns from labels alone.

The values are written to the run folder once, since a resumed run starts from trained values and must have the same
teacher. Source: consistency training of InternVL3.5 (ViCO, arXiv 2508.18265, section 2.3): forward KL to the finished
model at all of its tokens, rates drawn uniformly, the largest among them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from mllm.checkpoints.load import save_trainables
from mllm.model.modeling import ElasticForConditionalGeneration, ElasticOutput, Features
from mllm.model.trainables import trainable_names
from mllm.packing.attention import PackedAttention
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor
from mllm.training.step import Teacher, fixed_views, forward, make_training_batch
from mllm.utils.files import digest_of_file, written_whole

TEACHER = "teacher.safetensors"
"""The teacher's values in the folder of a run."""


class FrozenTeacher:
    """Runs a model with the values that its trainables had when this was made.

    Args:
        model: not wrapped; it is used as it is, and is the same afterwards.
        values: of everything that trains, by name; copied.
    """

    def __init__(self, model: ElasticForConditionalGeneration, values: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        assert values.keys() == set(trainable_names(model))
        self._model = model
        self._values = {name: value.detach().to(parameters[name], copy=True) for name, value in values.items()}

    @classmethod
    def of(cls, model: ElasticForConditionalGeneration) -> "FrozenTeacher":
        """Copy what trains in a model as it is now."""
        names = set(trainable_names(model))
        return cls(model, {name: value for name, value in model.named_parameters() if name in names})

    @classmethod
    def read(cls, model: ElasticForConditionalGeneration, folder: Path, digest: str) -> "FrozenTeacher":
        """Read the teacher of a run.

        Args:
            folder: of the run.
            digest: SHA-256 of the file, as the run's checkpoints remember it.

        Raises:
            ValueError: the file is missing or another one.
        """
        path = folder / TEACHER
        if not path.is_file():
            raise ValueError(f"{path} is missing; the run learns from it and cannot go on without it")
        if (now := digest_of_file(path)) != digest:
            raise ValueError(f"{path} has SHA-256 {now[:12]}..., and the run learned from one with {digest[:12]}...")
        return cls(model, load_file(path))

    def write(self, folder: Path) -> None:
        """Write the values to the folder of a run."""
        with written_whole(folder / TEACHER) as aside:
            save_trainables({name: value.cpu().contiguous() for name, value in self._values.items()}, aside)

    def __call__(self, **inputs: object) -> ElasticOutput:
        """Run the model with the teacher's values, without dropout and without gradients.

        Args:
            inputs: arguments of the model.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                return functional_call(self._model, self._values, kwargs=inputs)
        finally:
            self._model.train(was_training)

    def states(
        self,
        batch: Batch,
        processor: ElasticProcessor,
        *,
        features: Mapping[str, Features],
        device: torch.device,
        packed: bool,
        packed_attention: PackedAttention = "sdpa",
    ) -> Teacher:
        """Compute the hidden states at the targets of every row at the largest budget.

        Args:
            features: of frozen encoders, see `frozen_features`; encoders that train run with the teacher's values.
            packed: see `pack_views`.
        """
        views = fixed_views(batch.rows, [processor.space.largest()])
        training_batch = make_training_batch(batch, views, processor, packed=packed)
        outputs = forward(
            self, training_batch, _no_loss, device=device, features=features, packed_attention=packed_attention
        )
        assert outputs.target_states is not None
        return Teacher(training_batch.starts, outputs.target_states)


def _no_loss(head: Callable[[Tensor], Tensor], hidden_PH: Tensor) -> tuple[Tensor, Tensor]:
    """Ask for the hidden states alone: no logits, no loss. A `mllm.model.modeling.TargetLoss`."""
    return hidden_PH.new_zeros(()), hidden_PH.new_zeros(0)
