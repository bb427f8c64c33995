"""A checkout is imported module by module, its code is held to ours, and code that gives something else stops the run.

The checkouts here are of our own writing, with the names of the released ones: plain references on torch and
transformers. That the released code itself is equal is found by who has it; see docs/speed.md.
"""

import argparse
import sys
from pathlib import Path

import outcomes
import pytest
import released_code
from checkouts import import_released
from pooled_step import example
from torch import nn

RESAMPLER = """
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from transformers.modeling_utils import prune_linear_layer


class Resampler(nn.Module):
    def __init__(self, grid_size, embed_dim, num_heads, kv_dim):
        super().__init__()
        self.grid_size = grid_size
        self.query, self.pos_embed = (nn.Parameter(torch.zeros(grid_size**2, kv_dim)) for _ in range(2))
        self.attn = nn.MultiheadAttention(kv_dim, num_heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(kv_dim, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(kv_dim, embed_dim))

    def forward(self, x, num_visual_tokens):
        table = self.pos_embed.T.unflatten(1, (self.grid_size, self.grid_size))[None]
        keys = functional.interpolate(table, size=(24, 24), mode="bicubic").flatten(2).transpose(1, 2)
        query = (self.query + self.pos_embed)[None, :num_visual_tokens]
        return self.attn(self.ln_q(query), self.ln_k(keys), self.ln_v(x))[0] @ self.proj * FACTOR
"""
M3 = """
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ..sizes import IMAGE_TOKEN, WIDTH


class LlavaConfig(LlamaConfig):
    model_type = "llava_of_tests"


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = None

    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.vision_tower = Tower()
        self.model.mm_projector = nn.Sequential(
            nn.Linear(WIDTH, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def get_vision_tower(self):
        return self.model.vision_tower

    def forward(self, input_ids, attention_mask, labels, images, **kwargs):
        losses = []
        for scale in self.config.matryoshka_vis_token_scale:
            with torch.no_grad():
                features = self.model.vision_tower(images)
            grid = self.model.mm_projector(features).transpose(1, 2).unflatten(2, (24, 24))
            soft = functional.adaptive_avg_pool2d(grid, int(scale**0.5)).flatten(2).transpose(1, 2)
            embeds, targets = [], []
            for row in range(len(input_ids)):
                at = int((input_ids[row] == IMAGE_TOKEN).nonzero())
                text = self.model.embed_tokens(input_ids[row].clamp(min=0))
                embeds.append(torch.cat([text[:at], soft[row], text[at + 1 :]]))
                hidden = labels.new_full((scale,), -100)
                targets.append(torch.cat([labels[row, :at], hidden, labels[row, at + 1 :]]))
            states = self.model(inputs_embeds=torch.stack(embeds)).last_hidden_state
            logits = self.lm_head(states)[:, :-1].flatten(0, 1)
            losses.append(functional.cross_entropy(logits, torch.stack(targets)[:, 1:].flatten()))
        return (torch.stack(losses).mean(),)
"""


def write(checkout: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return checkout


def mqt_checkout(folder: Path, factor: float) -> Path:
    text = RESAMPLER.replace("FACTOR", str(factor))
    return write(folder, {"llava/model/multimodal_projector/builder.py": text})


def options(path: Path) -> argparse.Namespace:
    return argparse.Namespace(repeats=2, threads=1, results=path)


def test_a_module_is_imported_and_nothing_else_of_its_checkout_runs(tmp_path: Path) -> None:
    checkout = write(
        tmp_path,
        {
            "shelf/__init__.py": "raise SystemExit('everything of the checkout')",
            "shelf/book.py": "from nowhere_installed.deep import Cover\nfrom .page import NUMBER\n",
            "shelf/page.py": "NUMBER = 7\n",
        },
    )
    absent = {"nowhere_installed": (), "nowhere_installed.deep": ("Cover",)}
    book = import_released(checkout, "shelf.book", absent)
    assert book.NUMBER == 7
    assert book.Cover is None
    assert not [name for name in sys.modules if name.startswith(("shelf", "nowhere_installed"))]


def test_what_is_no_checkout_is_named_with_the_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no checkout of the released code: it holds no llava/model/llava_arch\.py"):
        import_released(tmp_path, "llava.model.llava_arch")


def test_names_of_m3_are_those_of_ours() -> None:
    ours = set(dict(example(released_code.LORA)[0].named_parameters()))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    for theirs in (
        "model.embed_tokens.weight",
        f"{layer}.base_layer.weight",
        f"{layer}.lora_A.default.weight",
        "model.norm.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "lm_head.weight",
    ):
        assert released_code.name_of_ours(theirs) in ours


def test_a_parameter_that_one_side_lacks_is_named() -> None:
    head = nn.ModuleDict({"lm_head": nn.Linear(2, 2, bias=False)})
    with pytest.raises(SystemExit, match=r"has a parameter lm_head\.weight, which ours has not"):
        released_code.share_weights(head, nn.Module())
    with pytest.raises(SystemExit, match=r"has no parameter for lm_head\.weight"):
        released_code.share_weights(nn.Module(), head)


def test_m3_reads_an_image_as_one_id_and_rows_padded_on_the_right() -> None:
    _, processor, batch = example(None, ((2, 3, 4), (2, 1, 1)))
    inputs = released_code.m3_inputs(batch, processor.placeholder_ids["image"])
    assert (inputs["input_ids"] == -200).sum(dim=1).tolist() == [1, 1]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [len(row.ids) for row in batch.rows]
    assert inputs["attention_mask"][1].tolist() == sorted(inputs["attention_mask"][1].tolist(), reverse=True)
    assert (inputs["labels"][~inputs["attention_mask"]] == -100).all()
    assert inputs["images"].shape == (2, 3, 336, 336)


@pytest.mark.slow
def test_a_resampler_is_timed_where_it_equals_ours_and_refused_where_it_does_not(tmp_path: Path) -> None:
    equal, other = mqt_checkout(tmp_path / "equal", 1.0), mqt_checkout(tmp_path / "other", 1.01)
    measured = released_code.compare_resamplers(equal, options(tmp_path / "none"))
    assert [outcome.what for outcome in measured] == [f"compressor of images, {n} tokens" for n in (256, 16, 2)]
    with pytest.raises(SystemExit, match=r"256 tokens differ by 9\.9e-03 of the largest value"):
        released_code.compare_resamplers(other, options(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "way"), [(released_code.LORA, "LoRA"), (None, "whole LLM")])
def test_a_step_of_m3_has_the_loss_and_the_gradients_of_ours(tmp_path: Path, adapter, way: str) -> None:
    sizes = f"IMAGE_TOKEN, WIDTH = {released_code.IMAGE_TOKEN}, {released_code.VISION.hidden_size}\n"
    files = {"llava/model/sizes.py": sizes, "llava/model/language_model/llava_llama.py": M3}
    released = import_released(write(tmp_path, files), "llava.model.language_model.llava_llama")
    results = tmp_path / "results.jsonl"
    again = adapter is None
    released_code.compare_m3_steps(released, options(results), way, adapter=adapter, computed_again=again)
    packed, low = outcomes.read(results)
    assert packed.what == f"step at 5 scales, packed, {way}"
    assert low.what == f"step at 5 scales, memory low, {way}"
    assert packed.check.startswith("losses equal, gradients within")
