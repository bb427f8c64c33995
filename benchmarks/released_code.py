"""Times the released code of MQT-LLaVA and of M3 itself, from checkouts that the user has, beside this package.

    python benchmarks/released_code.py [--mqt-checkout FOLDER] [--m3-checkout FOLDER] [--repeats 5] [--threads 1]

The other benchmarks follow released code line by line on our modules; this one runs it, on the same weights, in this
process and in turns. What it gives must equal what we give to 1e-5: outputs, or loss and all gradients. It runs with
the libraries that are installed here, not with the releases that it pins, so that both sides share the LLM's code.

- MQT-LLaVA (gordonhu608/MQT-LLaVA @92c35d0): `Resampler` of llava/model/multimodal_projector/builder.py, in eval mode
  without gradients, at the sizes of `folded_queries.py`, beside our compressor as it answers (folded).
- M3 (mu-cai/matryoshka-mm @f6aada8): `LlavaLlamaForCausalLM` of llava/model/language_model/llava_llama.py, whose
  forward at five scales and backward are the step of its training, beside our packed step and `memory: low`, on the
  model of `pooled_step.py`. Ways of training: LoRA as its finetune_lora.sh puts it, on all linear layers of the LLM
  (rank 128 of 4096 there, 16 of 512 here; no dropout, which would differ), and the whole LLM as in finetune.sh; both
  with the layers computed again, as both scripts have it, and kept. Vision runs without gradient in either, although
  the scripts unfreeze it (llava/model/multimodal_encoder/clip_encoder.py:46).
"""

import argparse
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from checkouts import import_released
from folded_queries import IN_SIZE, NUM_HEADS, PATCHES, build, predicted, runs_of
from outcomes import Outcome, append, table_of, timed
from pooled_step import ANSWER, BUDGETS, QUESTION, SCALES, SYSTEM, VISION, example
from pooled_step import predicted as predicted_steps
from rich.console import Console
from side_by_side import CPU, Compared, compare_steps, llm_config, low_memory_step, packed_step
from torch import Tensor, nn
from transformers import CLIPVisionModel
from turns import in_turns, options, unprepared

from mllm.config.model import LoraConfig
from mllm.processing.batch import Batch
from mllm.processing.placeholders import IGNORED_LABEL

RESAMPLER_GOALS = {256: 2.0, 16: 5.0, 2: None}
OUT_SIZE = 4096
MQT_ABSENT = {
    "transformers.modeling_utils": (
        "apply_chunking_to_forward",
        "find_pruneable_heads_and_indices",
        "prune_linear_layer",
    ),
    "einops": ("rearrange",),
    "requests": (),
    "torchvision": ("transforms",),
    "torchvision.transforms": ("InterpolationMode",),
}
"""What the file of the resampler imports and the resampler does not use."""

IMAGE_TOKEN = -200
"""What stands for an image in the ids that M3 reads (llava/constants.py)."""
LORA = LoraConfig(rank=16, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
ONE_ROW = ((SYSTEM, QUESTION, ANSWER),)
FOUR_ROWS = ((SYSTEM, 32, 32), (SYSTEM, 12, 96), (SYSTEM, 64, 8), (SYSTEM, 24, 48))
"""Tokens of system prompt, question and answer; both scripts have four rows to a batch."""
STEP_GOALS = {"whole LLM, layers computed again": {"packed": 1.7}}


def compare_resamplers(checkout: Path, arguments: argparse.Namespace) -> list[Outcome]:
    """Check that tokens are equal, and time MQT-LLaVA's resampler and ours on one image.

    Raises:
        SystemExit: they differ, or the checkout is none.
    """
    released = import_released(checkout, "llava.model.multimodal_projector.builder", MQT_ABSENT)
    ours = build(OUT_SIZE, CPU, torch.float32).requires_grad_(False)
    theirs = released.Resampler(grid_size=16, embed_dim=OUT_SIZE, num_heads=NUM_HEADS, kv_dim=IN_SIZE)
    theirs = theirs.float().eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, PATCHES, IN_SIZE, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for count, goal in RESAMPLER_GOALS.items():
        runs = {
            "theirs": torch.no_grad()(partial(theirs, images, num_visual_tokens=count)),
            "ours": runs_of(ours, images, count)["folded"],
        }
        tokens = {name: run() for name, run in runs.items()}
        off = float((tokens["ours"] - tokens["theirs"]).abs().max() / tokens["theirs"].abs().max())
        if off > 1e-5:
            raise SystemExit(f"FAILED: {count} tokens differ by {off:.1e} of the largest value")
        # A call takes milliseconds: there is time for many, and they are needed.
        times = in_turns(unprepared(runs), 5 * arguments.repeats, CPU)
        what, check = f"compressor of images, {count} tokens", f"outputs within {off:.0e} of the largest"
        against, flops = "MQT-LLaVA's own Resampler", predicted(count, OUT_SIZE)
        outcomes.append(timed(what, against, times["theirs"], times["ours"], check=check, predicted=flops, goal=goal))
    return outcomes


def compare_m3(checkout: Path, arguments: argparse.Namespace) -> None:
    """Check that losses and gradients are equal, time M3's steps and ours, print and hand on.

    Raises:
        SystemExit: they differ, or the checkout is none.
    """
    released = import_released(checkout, "llava.model.language_model.llava_llama")
    compare = partial(compare_m3_steps, released, arguments)
    for adapter, trained in ((LORA, "LoRA"), (None, "whole LLM")):
        compare(trained, adapter=adapter)
        compare(f"{trained}, layers computed again", adapter=adapter, computed_again=True)
    compare("whole LLM, layers computed again, 4 rows", adapter=None, computed_again=True, rows=FOUR_ROWS)


def compare_m3_steps(
    released: ModuleType,
    arguments: argparse.Namespace,
    way: str,
    *,
    adapter: LoraConfig | None,
    computed_again: bool = False,
    rows: Sequence[tuple[int, int, int]] = ONE_ROW,
) -> None:
    """Compare the steps of one way of training.

    Args:
        released: M3's module.
        way: its name in tables.
        adapter: None where the whole LLM trains.
        computed_again: compute the layers of the LLM again in the backward pass.
    """
    model, processor, batch = example(adapter, rows)
    theirs = m3_model(released, adapter)
    share_weights(theirs, model)
    if computed_again:
        for llm in (model.model.language_model, theirs):
            llm.gradient_checkpointing_enable({"use_reentrant": False})
    baseline, goals = "M3's own", STEP_GOALS.get(way, {})
    runs = {
        baseline: partial(m3_step, theirs, m3_inputs(batch, processor.placeholder_ids["image"])),
        "packed": partial(packed_step, model, processor, batch, BUDGETS),
        "memory low": partial(low_memory_step, model, processor, batch, BUDGETS),
    }
    pairs = [
        Compared(f"step at 5 scales, {one}, {way}", one, "M3's own forward and backward", baseline, goals.get(one))
        for one in ("packed", "memory low")
    ]
    flops = predicted_steps(model, processor, batch, 2 + (adapter is None) + computed_again)
    flops[baseline] = flops.pop("M3 loop")
    compare_steps(model, runs, arguments, title=f"step at scales {SCALES}, {way}", flops=flops, pairs=pairs)


def m3_model(released: ModuleType, adapter: LoraConfig | None) -> Any:
    """Build M3's model at the sizes of ours, as its train.py does, with weights that are random."""
    with tempfile.TemporaryDirectory() as folder:
        VISION.save_pretrained(folder)  # the tower reads its sizes from a folder
        config = released.LlavaConfig(
            **{**llm_config().to_dict(), "model_type": released.LlavaConfig.model_type},
            mm_vision_tower=folder,
            mm_vision_select_layer=-2,
            mm_hidden_size=VISION.hidden_size,
            mm_projector_type="mlp2x_gelu",
        )
        model = released.LlavaLlamaForCausalLM(config)
    tower = model.get_vision_tower()
    tower.vision_tower, tower.is_loaded = CLIPVisionModel(VISION), True
    model.config.matryoshka_vis_token_scale = list(SCALES)
    model.config.use_cache = False
    if adapter is not None:
        layers = rf"model\.layers\.\d+\.\w+\.({'|'.join(adapter.targets)})"  # those of vision have such names too
        lora = peft.LoraConfig(
            r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=layers, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    return model.train()


def share_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Put our parameters into M3's model, so that both have the very same weights and gradients.

    Raises:
        SystemExit: a parameter of the LLM or the projector that we do not have.
    """
    own, shared = dict(ours.named_parameters()), set()
    for name, parameter in list(theirs.named_parameters()):
        key = name_of_ours(name)
        if key in own and own[key].shape == parameter.shape:
            module, _, attribute = name.rpartition(".")
            theirs.get_submodule(module).register_parameter(attribute, own[key])
            shared.add(key)
        elif ".vision_tower." not in name:  # M3 runs the last layer of CLIP too, and reads the one before
            raise SystemExit(f"FAILED: this M3 has a parameter {name}, which ours has not")
    if missing := sorted(own.keys() - shared):
        raise SystemExit(f"FAILED: this M3 has no parameter for {missing[0]}")


def name_of_ours(name: str) -> str:
    """Translate the name of a parameter of M3's model."""
    name = name.removeprefix("base_model.model.")  # PEFT's
    name = re.sub(r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower.backbone.", name)
    name = re.sub(r"^model\.mm_projector\.", "model.compressors.image.projectors.0.", name)
    return re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", name)


def m3_inputs(batch: Batch, placeholder: int) -> dict[str, Tensor]:
    """Make the inputs that M3's collator makes: rows padded on the right."""
    rows = nn.utils.rnn.pad_sequence
    ids = [torch.tensor([IMAGE_TOKEN if id == placeholder else id for id in row.ids]) for row in batch.rows]
    labels = [torch.tensor(row.labels) for row in batch.rows]
    return {
        "input_ids": rows(ids, batch_first=True),
        "attention_mask": rows([torch.ones_like(one, dtype=torch.bool) for one in ids], batch_first=True),
        "labels": rows(labels, batch_first=True, padding_value=IGNORED_LABEL),
        "images": batch.values["pixel_values"],
    }


def m3_step(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Go forward at all scales, then backward once."""
    loss = model(**inputs)[0]
    loss.backward()
    return loss.item()


def main() -> None:
    """Compare what there is a checkout of."""
    folders = {
        "mqt_checkout": "checkout of gordonhu608/MQT-LLaVA",
        "m3_checkout": "checkout of mu-cai/matryoshka-mm, at a commit that has forward_single_matryoshka",
    }
    arguments = options(__doc__, 5, folders=folders)
    if arguments.mqt_checkout is None and arguments.m3_checkout is None:
        raise SystemExit("nothing to run: give --mqt-checkout or --m3-checkout")
    if arguments.mqt_checkout is not None:
        outcomes = compare_resamplers(arguments.mqt_checkout, arguments)
        Console(width=200).print(table_of(outcomes))
        append(outcomes, arguments.results)
    if arguments.m3_checkout is not None:
        compare_m3(arguments.m3_checkout, arguments)


if __name__ == "__main__":
    main()
