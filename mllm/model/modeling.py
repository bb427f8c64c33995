"""The elastic model with the LLM's head, as a native transformers model.

Knows tensors and counts. Does not know paths, text, budgets as words, or which budgets a step draws.
`model/backbone.py` draws the forward pass.

Shapes: B rows, S positions, N encoded media items, R placeholder runs, P positions whose logits are wanted, T frames of
the longest clip, H the LLM's hidden size, V its vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mllm.adapters.adapter_inputs import KEYWORD
from mllm.kv_cache.beam import allows_sharing, num_copies, prefill, reads_prompt_once
from mllm.kv_cache.names import cache_argument, cache_of, one_cache
from mllm.kv_cache.shared_prefix import Prefixes
from mllm.model.backbone import MEDIA_KEYS, VALUE_KEYS, ElasticModel, Features
from mllm.model.base import ElasticPreTrainedModel
from mllm.model.configuration import ElasticConfig
from mllm.packing.attention import KEYWORD as PLAN_KEYWORD
from mllm.packing.attention import PackedAttention, is_enabled, packed_mask
from mllm.packing.plan import SegmentPlan

Reader = Callable[[Callable[[Tensor], Tensor], Tensor], dict[str, Tensor]]
"""Takes the head and hidden states (P, H); gives a `loss` and whatever else is wanted, by name."""


@dataclass
class ElasticOutput(CausalLMOutputWithPast):
    """What the model gives, and what its adapter reports.

    Args:
        auxiliary: what is to be made small beside the loss, by name, each (B,); `auxiliary_weights` says how much it
            counts. `balance`: how unevenly a row's tokens use the experts, the mean over layers; 1 is even.
            `<medium>_balance`, `<medium>_z`: the same of a mixture of projectors, and how large its logits are.
        read: what a `reader` gave beside the loss.
        expert_usage: (L, B, K, N) how often tokens of each kind (`mllm.adapters.adapter_inputs.TOKEN_KINDS`) chose each
        of
            the N routed experts in each of the L layers.
    """

    auxiliary: dict[str, Tensor] | None = None
    expert_usage: Tensor | None = None
    read: dict[str, Tensor] | None = None


def auxiliary_weights(config: ElasticConfig) -> dict[str, float]:
    """What each of a model's auxiliary losses is multiplied by, by name; see `ElasticOutput`."""
    weights = {"balance": (config.adapter or {}).get("balance_weight", 0.0)}
    for medium, settings in (config.media or {}).items():
        weights[f"{medium}_balance"] = settings.get("projector_balance_weight", 0.01)
        weights[f"{medium}_z"] = settings.get("projector_z_weight", 0.001)
    return weights


class ElasticForConditionalGeneration(ElasticPreTrainedModel, GenerationMixin):
    """The elastic model with the LLM's own head. See `ElasticModel` for the drawing of the forward pass.

    Raises:
        ValueError: an LLM whose head scales its logits in a way this class does not reproduce.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        text = config.text_config
        assert text is not None
        for key in ("logits_scaling", "logit_scale"):
            if getattr(text, key, None) not in (None, 1, 1.0):
                raise ValueError(f"text_config.{key} of {text.model_type} is not supported; use a Llama, Qwen or Gemma")
        self.model = ElasticModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H), as the LLM's own class computes them."""
        lm_head: Any = self.lm_head
        logits = lm_head(hidden)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        logit_positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        num_image_tokens: Tensor | None = None,
        image_index: Tensor | None = None,
        image_layout: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        num_audio_tokens: Tensor | None = None,
        audio_rates: Tensor | None = None,
        audio_index: Tensor | None = None,
        video_values: Tensor | None = None,
        video_lengths: Tensor | None = None,
        num_video_tokens: Tensor | None = None,
        video_rates: Tensor | None = None,
        video_index: Tensor | None = None,
        scale_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        adapter_report: bool | None = None,
        plan: SegmentPlan | None = None,
        packed_attention: PackedAttention = "sdpa",
        features: Mapping[str, Features] | None = None,
        reader: Reader | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> ElasticOutput:
        """One pass over rows that may differ in media and in budgets.

        Args:
            input_ids: (B, S), one placeholder id per soft token of a run.
            labels: (B, S), -100 where nothing is to be learned; gives `loss`, the mean over target tokens (or their
                sum over `num_items_in_batch` when the trainer passes that).
            logits_to_keep: logits of the last n positions only, or of the given ones; 0 keeps all.
            logit_positions: (P,) flat positions in B*S; the logits are then (P, V) and nothing else is computed.
            pixel_values: (N, 3, h, w); or (N, P, values of a patch) with image_grids (N, 2), the rows and columns of
                each image, where images keep their shape. num_image_tokens: (R,). image_index: (R,) item of each
                run. image_layout: (P, 2) of each placeholder the run and the place in it, or -1 for a newline, where
                images are cut into tiles.
            audio_values: (N, ...) with audio_lengths (N,) in raw samples; num_audio_tokens, audio_rates: (R,).
            video_values: (N, T, 1, h, w) with video_lengths (N,) in frames; num_video_tokens, video_rates: (R,).
            scale_ids, task_ids: (B,) which experts of the adapter each row uses; -1 for the shared one alone.
            adapter_report: give the adapter's `balance` and `expert_usage`, where it has experts; as in training by
                default. What a mixture of projectors reports is given in training.
            plan: how rows are packed; the shapes above then have B = 1, `scale_ids` and `task_ids` are (1, S), and
                reports are by row. See `mllm.packing.pack`.
            packed_attention: what computes the attention of packed rows.
            features: by medium what `ElasticModel.encode` gave; those media are not encoded.
            reader: makes the loss of the hidden states at `logit_positions`; there are no logits then.
            cache, past_key_values: keys and values of what was read before: two names of one argument, since `generate`
                calls it `cache` from transformers 5.24 on.

        Raises:
            ValueError: packed rows for an LLM that was not prepared for them, or a cache under both names.
        """
        media = {
            "pixel_values": pixel_values,
            "image_grids": image_grids,
            "num_image_tokens": num_image_tokens,
            "image_index": image_index,
            "image_layout": image_layout,
            "audio_values": audio_values,
            "audio_lengths": audio_lengths,
            "num_audio_tokens": num_audio_tokens,
            "audio_rates": audio_rates,
            "audio_index": audio_index,
            "video_values": video_values,
            "video_lengths": video_lengths,
            "num_video_tokens": num_video_tokens,
            "video_rates": video_rates,
            "video_index": video_index,
        }
        num_items = kwargs.pop("num_items_in_batch", None)
        with_report = self.training if adapter_report is None else adapter_report
        rows = self.model.adapter_inputs(
            input_ids, attention_mask, scale_ids, task_ids, with_report=with_report, plan=plan
        )
        if rows is not None:
            kwargs[KEYWORD] = rows
        if plan is not None:
            if not is_enabled(self.model.language_model):
                raise ValueError("packed rows need an LLM prepared by mllm.packing.attention.enable_packing")
            assert input_ids is not None
            attention_mask = packed_mask(plan, input_ids.device, packed_attention)
            position_ids, kwargs[PLAN_KEYWORD] = plan.position_ids, plan
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            features=features,
            plan=plan,
            **cache_argument(one_cache(cache, past_key_values)),
            **media,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if logit_positions is not None:
            hidden = hidden.flatten(0, 1)[logit_positions]
        elif isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            hidden = hidden[:, kept]
        read = {} if reader is None else reader(self.head, hidden)
        logits = self.head(hidden) if reader is None else None
        loss = read.pop("loss", None)
        if labels is not None:
            assert logits is not None
            vocab_size = logits.shape[-1]
            loss = self.loss_function(logits, labels, vocab_size=vocab_size, num_items_in_batch=num_items)
        balance, usage = rows.collector.take() if rows is not None and rows.collector is not None else ([], [])
        auxiliary = self.model.routing_losses(input_ids, media, plan)
        if balance:
            auxiliary["balance"] = torch.stack(balance).mean(dim=0)
        return ElasticOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary=auxiliary or None,
            expert_usage=torch.stack(usage) if usage else None,
            read=read or None,
            **cache_argument(cache_of(outputs)),
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers does it, but ids that assisted decoding guesses after an embedded prompt are embedded too."""
        parent: Any = super()
        if inputs_embeds is not None and is_first_iteration:
            guessed = input_ids[:, inputs_embeds.shape[1] :]
            inputs_embeds = torch.cat([inputs_embeds, self.model.words(guessed)], dim=1)
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

        Raises:
            ValueError: groups of rows, or a constant prompt, together with options that forbid sharing.
        """
        media = {key: kwargs.pop(key, None) for key in MEDIA_KEYS}
        input_ids = kwargs.pop("input_ids", inputs)
        constant = kwargs.pop("constant_prompt", None)
        prefixes = _prefixes_of(kwargs, self.generation_config)
        if constant is not None:
            _check_sharing("constant_prompt", kwargs, self.generation_config)
        is_soft = None
        if prefixes is not None or any(media[key] is not None for key in VALUE_KEYS.values()):
            placeholders = list((self.config.placeholder_ids or {}).values())
            is_soft = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device))
            shown = input_ids if prefixes is None else input_ids[prefixes.first_rows]
            kwargs["inputs_embeds"] = self.model.embed(shown, media)
            text_ids = input_ids.masked_fill(is_soft, 0)
            # The logits have no place for a new token behind the LLM's vocabulary, and what looks ids up in them (a
            # penalty for repetition) must not look for one; like a soft token it is there as an embedding alone.
            is_soft = is_soft | (input_ids >= self.config.get_text_config().vocab_size)
            input_ids = input_ids.masked_fill(is_soft, self.generation_config.pad_token_id or 0)
        row_inputs = {key: kwargs.get(key) for key in ("scale_ids", "task_ids")}
        past = None
        if prefixes is not None:
            past = prefixes.read(self, kwargs["inputs_embeds"], constant=constant, **row_inputs)
            text_embeds = self.model.words(text_ids)
            kwargs["inputs_embeds"] = prefixes.on_rows(kwargs["inputs_embeds"], text_embeds)
        elif constant is not None:
            past = constant.on_rows(self, kwargs["attention_mask"], **row_inputs)
        if reads_prompt_once(input_ids, kwargs, self.generation_config):
            past = prefill(
                self,
                input_ids,
                kwargs["attention_mask"],
                inputs_embeds=kwargs.get("inputs_embeds"),
                copies=num_copies(kwargs, self.generation_config),
                past=past,
                **row_inputs,
            )
        if past is not None:
            kwargs |= cache_argument(past)
            if is_soft is not None and not is_soft[:, past.get_seq_length() :].any():
                del kwargs["inputs_embeds"]  # what is left of the prompts is text; B * C embeddings need not be made
        parent: Any = super()
        return parent.generate(input_ids, **kwargs)


def _prefixes_of(options: dict[str, Any], generation_config: Any) -> Prefixes | None:
    """What `generate` was told of rows that begin alike, taken out of its options.

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
