"""An LLM out of a GGUF file: the numbers, the words, and every file that would be read wrongly or in part."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks import medium
from safetensors.torch import load_file

from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.checkpoints.pretrained import llm_config, load_llm, read_tokenizer
from mllm.config.model import LoraConfig, ModelConfig
from mllm.model.trainables import set_trainables
from mllm.real.packages import package_file
from mllm.real.smollm2 import FILE, PACKAGE, write_smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gguf") is None and "REQUIRE_REAL" not in os.environ,
        reason="gguf is not installed; run `make test-real`",
    ),
]
WIDTH, WORDS = 32, 8


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return package_file(PACKAGE, FILE)


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    config = llm_config(str(source))
    return dict(load_llm(str(source), config, dtype=torch.bfloat16, attention="sdpa").state_dict())


def test_the_numbers_and_words_are_those_of_transformers(smollm2: Path, tmp_path: Path) -> None:
    folder = write_smollm2(tmp_path / "folder")
    ours, theirs = weights_of(smollm2), load_file(folder / "model.safetensors")
    assert ours.keys() - theirs.keys() == {"lm_head.weight"}  # which is the embedding
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    text = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [read_tokenizer(str(source)).apply_chat_template(text, tokenize=False) for source in (smollm2, folder)]
    assert prompts[0] == prompts[1]


def test_a_run_stands_on_the_file_and_knows_it_again(smollm2: Path, tmp_path: Path) -> None:
    image = medium("image", {"encoder": {"source": "synthetic:vision"}, "compressor": "pool", "budgets": [1, 4]})
    file = tmp_path / "llm.gguf"
    file.symlink_to(smollm2)
    model, processor = build(ModelConfig(llm=str(file), image=image, adapter=LoraConfig(rank=2), dtype="bfloat16"))
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    again, _ = load(tmp_path / "run", dtype="bfloat16", device="cpu")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    file.unlink()
    write_llama(file)
    with pytest.raises(ValueError, match=r"the weights of llm in .* are not those this model was trained on"):
        load(tmp_path / "run", dtype="bfloat16", device="cpu")


def write_llama(path: Path, *, double: str = "", **changes: Any) -> Path:
    """Write a Llama of one layer, one tensor as `double`; `changes` add tensors, or leave them out where None, and add
    metadata."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (WORDS, WIDTH),
        "output_norm.weight": (WIDTH,),
        **{f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": (2 * WIDTH, WIDTH) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (WIDTH, 2 * WIDTH),
        **{f"blk.0.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")},
    }
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_name("tiny")
    for name, value in changes.items():
        if name.startswith("llama.") and value is not None:
            writer.add_string(name, value)
        elif name == "split.count":
            writer.add_uint16(name, value)
        else:
            shapes[name] = value
    for name, shape in shapes.items():
        if shape is not None:
            writer.add_tensor(name, rng.normal(size=shape).astype(np.float64 if name == double else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.0.ffn_up.weight": None}, r"missing model.layers.0.mlp.up_proj.weight"),
        ({"blk.0.ffn_up.weight": (WIDTH, WIDTH)}, r"up_proj.weight has shape \(32, 32\), the model has \(64, 32\)"),
        ({"rope_freqs.weight": (8,)}, r"holds rope_freqs.weight, which transformers has no place for in a llama"),
        ({"llama.rope.scaling.type": "yarn"}, r"scales positions \(llama.rope.scaling.type is yarn\)"),
        ({"split.count": 3}, r"is one of 3 files; merge them"),
        ({"blk.0.ffn_up_exps.weight": (2, 2, 32)}, r"holds a mixture of experts"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert weights_of(write_llama(tmp_path / "whole.gguf"))["model.embed_tokens.weight"].shape == (WORDS, WIDTH)
    with pytest.raises(ValueError, match=message):
        weights_of(write_llama(tmp_path / "changed.gguf", **changes))


def test_a_tensor_in_a_form_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "whole.gguf", double="blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match=r"whole.gguf holds blk.0.ffn_up.weight in a form that is not read: .* F64"):
        weights_of(file)


def test_a_folder_has_one_file(smollm2: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "a.gguf")
    assert llm_config(str(tmp_path)).hidden_size == WIDTH
    write_llama(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one of them, such as .*a.gguf"):
        llm_config(str(tmp_path))
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"b.gguf is no GGUF file, or is cut"):
        llm_config(str(tmp_path / "b.gguf"))
    with pytest.raises(ValueError, match=r"the file .*c.gguf is not there"):
        llm_config(str(tmp_path / "c.gguf"))
