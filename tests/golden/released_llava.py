"""Released checkpoints in LLaVA's layout, rebuilt from a golden file, converted by the command and asked again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rebuild import Golden
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from mllm.budget import Budget, Extent
from mllm.checkpoints.load import load
from mllm.cli import main
from mllm.processing.batch import Batch, EncodedSample, Expanded, MediaSpan
from mllm.processing.processor import ElasticProcessor


@dataclass(frozen=True)
class Released:
    """A golden file, and the model and the processor that its checkpoint was converted to."""

    golden: Golden
    model: Any
    processor: ElasticProcessor

    @property
    def counts(self) -> list[int]:
        """The counts of visual tokens that the file holds results of."""
        return [int(key.removeprefix("loss/")) for key in self.golden.facts["results"] if key.startswith("loss/")]

    @property
    def pixel_values(self) -> Tensor:
        """The images; the files name only what is an array `input.NAME` by its shape."""
        return self.golden.array("input.pixel_values", self.golden.facts["inputs"]["pixel_values"])

    def rows(self) -> Batch:
        """The rows of the file without their padding; each shows the image of its own number."""
        inputs = self.golden.facts["inputs"]
        columns = (inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
        rows = []
        for ids, labels, mask in zip(*columns, strict=True):
            end = sum(mask)
            assert mask == [1] * end + [0] * (len(mask) - end)
            rows.append(self._row(ids[:end], labels[:end], len(rows)))
        return Batch(rows, {"pixel_values": self.pixel_values})

    def question(self) -> Batch:
        """The prompt that is continued, with its image."""
        inputs = self.golden.facts["inputs"]
        ids, image = inputs["greedy_prompt"], inputs["greedy_image"]
        return Batch([self._row(ids, [-100] * len(ids), 0)], {"pixel_values": self.pixel_values[image : image + 1]})

    def expanded(self, batch: Batch, count: int, *, for_training: bool) -> Expanded:
        budgets = [[Budget.parse(f"image={count}")] * len(batch.rows)]
        return self.processor.expand(batch, budgets, left_padding=not for_training)

    def _row(self, ids: Sequence[int], labels: Sequence[int], item: int) -> EncodedSample:
        marker, placeholder = self.golden.facts["image_token"], self.processor.placeholder_ids["image"]
        grid = self.processor.facts["image"].grid
        ours = [placeholder if token_id == marker else token_id for token_id in ids]
        return EncodedSample(f"row{item}", ours, labels, (MediaSpan(Extent("image", grid=grid), item),))

    def assert_golden(self, result: Tensor, name: str) -> None:
        """Equal where the golden array is a number."""
        expected = self.golden.arrays[name]
        assert result.shape == expected.shape, name
        is_number = ~expected.isnan()
        torch.testing.assert_close(
            result[is_number], expected[is_number], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}"
        )


def convert_golden(golden: Golden, system: str, folder: Path, exceptions: Mapping[str, Tensor]) -> Released:
    """Write the released checkpoint, convert it by the command, and load the run folder.

    Args:
        exceptions: entries that are not from the recipe.
    """
    torch.save({**golden.state(golden.facts["layout"]), **exceptions}, folder / "pytorch_model.bin")
    _write_sources(golden.facts, folder)
    words = ["--llm", str(folder / "llm"), "--vision", str(folder / "vision")]
    words += ["--feature_layer", str(golden.facts["select_layer"]), "--out", str(folder / "run")]
    assert main(["convert", system, str(folder / "pytorch_model.bin"), *words]) == 0
    (folder / "pytorch_model.bin").unlink()
    return Released(golden, *load(folder / "run"))


def _write_sources(facts: Mapping[str, Any], folder: Path) -> None:
    """Configs, tokenizer and image processor, which a single file does not hold."""
    text = LlamaConfig(**facts["text_config"])
    text.save_pretrained(folder / "llm")
    vocabulary = {f"w{token_id}": token_id for token_id in range(text.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    ids = {f"{kind}_token": getattr(text, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    special = {name: f"w{token_id}" for name, token_id in ids.items() if token_id is not None}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "llm")
    vision = CLIPVisionConfig(**facts["vision_config"])
    vision.save_pretrained(folder / "vision")
    size = vision.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder / "vision"
    )


@torch.no_grad()
def check_encoder_and_connector(released: Released) -> None:
    """The patches, and the soft tokens at every count; the files hold the first ones."""
    features = released.model.model.encode("image", released.pixel_values)
    kept = released.golden.arrays["vision_tower"].shape[1]
    released.assert_golden(features.values[:, :kept], "vision_tower")
    for count in released.counts:
        name = f"connector/{count}"
        counts = torch.full((len(released.pixel_values),), count)
        soft = released.model.model.compress("image", features, num_tokens=counts, max_tokens=count)
        assert soft.shape[1] == count
        released.assert_golden(soft[:, : released.golden.arrays[name].shape[1]], name)


@torch.no_grad()
def check_logits_and_losses(released: Released) -> None:
    """The last positions of the padded batch, and the mean loss over its targets."""
    for count in released.counts:
        batch = released.expanded(released.rows(), count, for_training=True)
        output = released.model(**batch.inputs, labels=batch.labels)
        name = f"logits/{count}"
        is_token = batch.inputs["attention_mask"].bool()[..., None]
        logits = output.logits.masked_fill(~is_token, 0.0)[:, -released.golden.arrays[name].shape[1] :]
        golden = released.golden.arrays[name]
        logits = logits.where(~golden.isnan(), golden)
        released.assert_golden(logits, name)
        expected = released.golden.facts["results"][f"loss/{count}"]
        assert float(output.loss) == pytest.approx(expected, rel=1e-4, abs=1e-4), count


@torch.no_grad()
def check_greedy_ids(released: Released) -> None:
    """What follows the prompt, token by token."""
    for count in released.counts:
        batch = released.expanded(released.question(), count, for_training=False)
        ids = released.model.generate(
            **batch.inputs,
            max_new_tokens=released.golden.facts["inputs"]["greedy_new_tokens"],
            do_sample=False,
            eos_token_id=released.golden.facts["text_config"]["eos_token_id"],
            pad_token_id=released.processor.pad_id,
        )
        new_ids = ids[0, batch.inputs["input_ids"].shape[1] :].tolist()
        assert new_ids == released.golden.facts["results"][f"greedy/{count}"], count


def check_every_result_is_compared(released: Released, extra: set[str]) -> None:
    """Nothing in the files is left out by the names the checks look for."""
    assert {f"{kind}/{count}" for count in released.counts for kind in ("loss", "greedy")} | extra == set(
        released.golden.facts["results"]
    )
    arrays = {f"{kind}/{count}" for count in released.counts for kind in ("connector", "logits")}
    assert arrays | {"vision_tower"} == set(released.golden.arrays)
