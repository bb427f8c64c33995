"""Adds transformers' `generate` to the elastic model: media encoded once, beginnings that rows share read once.

Knows prompts, caches and what rows have in common. Does not know how a forward pass is computed.

Shapes: B rows of S positions, G groups of rows, C new tokens, H the LLM's width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from mllm.hosts import find_family
from mllm.kv_cache.beam import allows_sharing, num_copies, prefill, reads_prompt_once, spread
from mllm.kv_cache.names import cache_argument
from mllm.kv_cache.shared_prefix import Prefixes
from mllm.model.configuration import ElasticConfig
from mllm.model.media_arguments import MEDIA_KEYS, VALUE_KEYS


class ElasticGenerationMixin(GenerationMixin):
    """Generates from prompts with media, for a model whose body is an `ElasticModel`."""

    config: ElasticConfig
    model: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare inputs; ids that assisted decoding guesses after an embedded prompt are embedded too."""
        parent: Any = super()
        if inputs_embeds is not None and is_first_iteration:
            guessed = input_ids[:, inputs_embeds.shape[1] :]
            inputs_embeds = torch.cat([inputs_embeds, self.model.embed_text(guessed)], dim=1)
        return parent.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; media are encoded once per item and prompts read once per row, whatever the beams.

        Takes the media arguments of `forward` and everything `GenerationMixin.generate` takes; returns what it does,
        the prompt included. In the returned ids a placeholder, and a new token behind the LLM's vocabulary, reads as
        the pad id, or 0 where there is none. Options that ask for another cache, or to see the pass over the prompt,
        make every beam read it (see `mllm.kv_cache.beam`).

        With `prefix_index` (B,) and `prefix_lengths` (G,), rows of one group show the same media and begin with so many
        equal ids, which are read once (see `mllm.kv_cache.shared_prefix`); the media arguments are then those of the
        first row of each group alone.

        With `constant_prompt`, every row begins with that text, which has been read before (see
        `mllm.kv_cache.system_prompt`).

        With `features`, by medium what `ElasticModel.encode` gave, those media are not encoded again; their raw values
        need not be given.

        Raises:
            ValueError: groups of rows, or a constant prompt, together with options that forbid sharing.
        """
        prompts = self._begin_prompts(kwargs.pop("input_ids", inputs), kwargs)
        past = prompts.past
        if not self._reads_whole and reads_prompt_once(prompts.input_ids, kwargs, self.generation_config):
            past = self._read_rest(prompts, kwargs)
            past = spread(past, num_copies(kwargs, self.generation_config))
        if past is not None:
            kwargs |= cache_argument(past)
            if prompts.is_soft is not None and not prompts.is_soft[:, past.get_seq_length() :].any():
                del kwargs["inputs_embeds"]  # what is left of the prompts is text; B * C embeddings need not be made
        parent: Any = super()
        return parent.generate(prompts.input_ids, **kwargs)

    @torch.no_grad()
    def read_prompts(self, **kwargs: Any) -> tuple[DynamicCache, Tensor | None]:
        """Reads all prompts but their last token, from which `generate` can go on.

        Takes what `generate` takes of prompts and media: `input_ids` (B, S) padded on the left, `attention_mask`,
        media arguments, `features`, shared beginnings and a constant prompt.

        Returns:
            A cache of S - 1 positions for B rows, whose layers keep everything, also those of a sliding window; and the
            embeddings (B, H) of the last tokens, None where the ids of all of them say as much. A prompt may end with a
            soft token, or with a new token behind the LLM's vocabulary.

        Raises:
            ValueError: groups of rows, or a constant prompt, together with options that forbid sharing; or a host whose
                prompts cannot be read in parts.
        """
        if self._reads_whole:
            raise ValueError(f"prompts of this host cannot be read in parts: {self._reads_whole}")
        prompts = self._begin_prompts(kwargs.pop("input_ids"), kwargs)
        cache = self._read_rest(replace(prompts, past=DynamicCache() if prompts.past is None else prompts.past), kwargs)
        ends_soft = prompts.is_soft is not None and bool(prompts.is_soft[:, -1].any())
        return cache, kwargs["inputs_embeds"][:, -1] if ends_soft else None

    @property
    def _reads_whole(self) -> str:
        """Why prompts cannot be read in parts; empty where they can."""
        host = self.config.host_config
        return "" if host is None else find_family(host.model_type, reference="the host").reads_whole

    def _begin_prompts(self, input_ids: Any, kwargs: dict[str, Any]) -> "_Prompts":
        """Encodes the media of prompts and reads what rows share; takes the arguments about both out of `kwargs`.

        `inputs_embeds` are put into `kwargs` where the ids do not say it all.
        """
        media = {key: kwargs.pop(key, None) for key in MEDIA_KEYS}
        constant = kwargs.pop("constant_prompt", None)
        features = kwargs.pop("features", None)
        prefixes = _prefixes_of(kwargs, self.generation_config)
        if constant is not None:
            _check_sharing("constant_prompt", kwargs, self.generation_config)
        is_soft = None
        if prefixes is not None or features or any(media[key] is not None for key in VALUE_KEYS.values()):
            placeholders = list((self.config.placeholder_ids or {}).values())
            is_soft = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device))
            shown = input_ids if prefixes is None else input_ids[prefixes.first_rows]
            kwargs["inputs_embeds"] = self.model.embed(shown, media, features=features)
            text_ids = input_ids.masked_fill(is_soft, 0)
            # The logits have no place for a new token behind the LLM's vocabulary, and what looks ids up in them (a
            # penalty for repetition) must not look for one; like a soft token it is there as an embedding alone.
            is_soft = is_soft | (input_ids >= self.config.get_text_config().vocab_size)
            input_ids = input_ids.masked_fill(is_soft, self.generation_config.pad_token_id or 0)
        past = None
        if prefixes is not None:
            past = prefixes.read(self, kwargs["inputs_embeds"], constant=constant, **_row_inputs(kwargs))
            text_embeds = self.model.embed_text(text_ids)
            kwargs["inputs_embeds"] = prefixes.on_rows(kwargs["inputs_embeds"], text_embeds)
        elif constant is not None:
            past = constant.on_rows(self, kwargs["attention_mask"], **_row_inputs(kwargs))
        return _Prompts(input_ids, is_soft, past)

    def _read_rest(self, prompts: "_Prompts", kwargs: dict[str, Any]) -> DynamicCache:
        return prefill(
            self,
            prompts.input_ids,
            kwargs["attention_mask"],
            inputs_embeds=kwargs.get("inputs_embeds"),
            past=prompts.past,
            **_row_inputs(kwargs),
        )


@dataclass(frozen=True)
class _Prompts:
    """Prompts whose media have been encoded.

    Args:
        input_ids: (B, S), with no id that the logits have no place for.
        is_soft: (B, S) where an embedding stands for no such id; None where all are ids.
        past: what has been read of the prompts already.
    """

    input_ids: Tensor
    is_soft: Tensor | None
    past: DynamicCache | None


def _row_inputs(kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
    """What the model takes per row beside its prompt."""
    return {key: kwargs.get(key) for key in ("scale_ids", "task_ids", "prompt_positions")}


def _prefixes_of(options: dict[str, Any], generation_config: Any) -> Prefixes | None:
    """Take what `generate` was told of rows that begin alike out of its options.

    Raises:
        ValueError: options of `generate` that ask for another cache, or to see the pass over the prompt.
    """
    index, lengths = options.pop("prefix_index", None), options.pop("prefix_lengths", None)
    if index is None:
        return None
    if lengths is None:
        raise ValueError("prefix_index goes with prefix_lengths")
    _check_sharing("prefix_index", options, generation_config)
    return Prefixes(index, lengths, options["attention_mask"])


def _check_sharing(key: str, options: dict[str, Any], generation_config: Any) -> None:
    if options.get("attention_mask") is None or not allows_sharing(options, generation_config):
        raise ValueError(
            f"{key} goes with attention_mask, and with use_cache and the library's own dynamic cache; leave it out to "
            "read every prompt by itself"
        )
