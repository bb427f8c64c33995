"""Whatever transformers calls the key-value cache, it reaches the decoder, and nobody uses the name that is leaving."""

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import llm_config
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.utils import logging

import mllm
from mllm.kv_cache.names import CACHE_NAME, CACHE_NAMES, _name_in, cache_argument, cache_of, one_cache
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration

PACKAGE = Path(mllm.__file__).parent
IDS = torch.arange(3, 12)[None]


@pytest.fixture
def model() -> ElasticForConditionalGeneration:
    torch.manual_seed(0)
    return ElasticForConditionalGeneration(ElasticConfig(text_config=llm_config().to_dict())).eval()


def test_the_name_is_that_of_the_release_notes() -> None:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert ("cache" if version >= (5, 24) else "past_key_values") == CACHE_NAME


def test_the_library_uses_one_name_for_generate_decoders_and_outputs() -> None:
    outputs = LlamaForCausalLM(llm_config())(IDS, use_cache=True)
    assert list(outputs.keys())[-1] == CACHE_NAME
    for function in (GenerationMixin.prepare_inputs_for_generation, LlamaForCausalLM.forward):
        assert [name for name in CACHE_NAMES if name in inspect.signature(function).parameters] == [CACHE_NAME]


def test_a_third_name_is_refused_with_the_version() -> None:
    def forward(memory: Any) -> None:
        """Take the cache under a name of next year."""

    with pytest.raises(ImportError, match=rf"transformers {re.escape(transformers.__version__)} takes .* neither as"):
        _name_in(forward)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_our_forward_goes_on_from_a_cache_under_either_name(model: ElasticForConditionalGeneration, name: str) -> None:
    whole = model(input_ids=IDS).logits[:, -1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = cache_of(model(input_ids=IDS[:, :-1], use_cache=True))
        cache_kwargs: dict[str, Any] = {name: first}
        second = model(input_ids=IDS[:, -1:], use_cache=True, **cache_kwargs)
    torch.testing.assert_close(second.logits[:, -1], whole)
    assert cache_of(second).get_seq_length() == IDS.shape[1]


def test_one_call_gives_one_cache(model: ElasticForConditionalGeneration) -> None:
    cache = cache_of(model(input_ids=IDS, use_cache=True))
    assert one_cache(cache, None) is one_cache(None, cache) is cache
    assert one_cache(None, None) is None
    with pytest.raises(ValueError, match="got cache and past_key_values"):
        model(input_ids=IDS, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_meets_no_deprecated_name(
    model: ElasticForConditionalGeneration, num_beams: int, caplog: pytest.LogCaptureFixture
) -> None:
    logging.warning_once.cache_clear()  # else what another test caused would hide what this one does
    library = logging.get_logger("transformers")
    library.propagate, before = True, library.propagate
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, num_beams=num_beams)
            past = cache_of(model(input_ids=IDS[:, :-1], use_cache=True))
            model.generate(
                IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, **cache_argument(past)
            )
    finally:
        library.propagate = before
    assert not [record.message for record in caplog.records if "deprecated" in record.message]


def test_the_names_are_written_in_one_module_and_in_the_signatures_generate_reads() -> None:
    """Anywhere else a literal name works with one version of the library only."""
    named = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"past_key_values|\bcache=", path.read_text())}
    assert named == {"names.py", "modeling.py"}
