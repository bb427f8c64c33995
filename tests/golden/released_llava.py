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
        own = self.golden.facts["inputs"]
        columns = (own["input_ids"], own["labels"], own["attention_mask"])
        rows = []
        for ids, labels, mask in zip(*columns, strict=True):
            end = sum(mask)
            assert mask == [1] * end + [0] * (len(mask) - end)
            rows.append(self._row(ids[:end], labels[:end], len(rows)))
        return Batch(rows, {"pixel_values": self.pixel_values})

    def question(self) -> Batch:
        """The prompt that is continued, with its image."""
        own = self.golden.facts["inputs"]
        ids, image = own["greedy_prompt"], own["greedy_image"]
        return Batch([self._row(ids, [-100] * len(ids), 0)], {"pixel_values": self.pixel_values[image : image + 1]})

    def expanded(self, batch: Batch, count: int, *, for_training: bool) -> Expanded:
        budgets = [[Budget.parse(f"image={count}")] * len(batch.rows)]
        return self.processor.expand(batch, budgets, left_padding=not for_training)

    def _row(self, ids: Sequence[int], labels: Sequence[int], item: int) -> EncodedSample:
        marker, own = self.golden.facts["image_token"], self.processor.placeholder_ids["image"]
        grid = self.processor.facts["image"].grid
        ours = [own if token_id == marker else token_id for token_id in ids]
        return EncodedSample(f"row{item}", ours, labels, (MediaSpan(Extent("image", grid=grid), item),))

    def assert_golden(self, found: Tensor, name: str) -> None:
        """Equal where the golden array is a number."""
        expected = self.golden.arrays[name]
        assert found.shape == expected.shape, name
        is_number = ~expected.isnan()
        torch.testing.assert_close(
            found[is_number], expected[is_number], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}"
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
def check_tower_and_connector(own: Released) -> None:
    """The patches, and the soft tokens at every count; the files hold the first ones."""
    features = own.model.model.encode("image", own.pixel_values)
    kept = own.golden.arrays["vision_tower"].shape[1]
    own.assert_golden(features.values[:, :kept], "vision_tower")
    for count in own.counts:
        name = f"connector/{count}"
        counts = torch.full((len(own.pixel_values),), count)
        soft = own.model.model.compress("image", features, num_tokens=counts, max_tokens=count)
        assert soft.shape[1] == count
        own.assert_golden(soft[:, : own.golden.arrays[name].shape[1]], name)


@torch.no_grad()
def check_logits_and_losses(own: Released) -> None:
    """The last positions of the padded batch, and the mean loss over its targets."""
    for count in own.counts:
        batch = own.expanded(own.rows(), count, for_training=True)
        output = own.model(**batch.inputs, labels=batch.labels)
        name = f"logits/{count}"
        is_token = batch.inputs["attention_mask"].bool()[..., None]
        logits = output.logits.masked_fill(~is_token, 0.0)[:, -own.golden.arrays[name].shape[1] :]
        golden = own.golden.arrays[name]
        logits = logits.where(~golden.isnan(), golden)
        own.assert_golden(logits, name)
        expected = own.golden.facts["results"][f"loss/{count}"]
        assert float(output.loss) == pytest.approx(expected, rel=1e-4, abs=1e-4), count


@torch.no_grad()
def check_greedy_ids(own: Released) -> None:
    """What follows the prompt, token by token."""
    for count in own.counts:
        batch = own.expanded(own.question(), count, for_training=False)
        ids = own.model.generate(
            **batch.inputs,
            max_new_tokens=own.golden.facts["inputs"]["greedy_new_tokens"],
            do_sample=False,
            eos_token_id=own.golden.facts["text_config"]["eos_token_id"],
            pad_token_id=own.processor.pad_id,
        )
        new_ids = ids[0, batch.inputs["input_ids"].shape[1] :].tolist()
        assert new_ids == own.golden.facts["results"][f"greedy/{count}"], count


def check_every_result_is_compared(own: Released, extra: set[str]) -> None:
    """Nothing in the files is left out by the names the checks look for."""
    assert {f"{kind}/{count}" for count in own.counts for kind in ("loss", "greedy")} | extra == set(
        own.golden.facts["results"]
    )
    arrays = {f"{kind}/{count}" for count in own.counts for kind in ("connector", "logits")}
    assert arrays | {"vision_tower"} == set(own.golden.arrays)
