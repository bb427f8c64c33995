"""Builds the elastic model as a native transformers model: encoders, compressors, an unmodified decoder LLM, its head.

Knows tensors and counts. Does not know paths, text, budgets as words, or which budgets a step samples.
`generate` is in `generation.py`.

Shapes: B rows, S positions, N encoded media items, R spans of placeholders, T features of the longest item, K soft
tokens of the longest span, D an encoder's feature size, H the LLM's hidden size, V its vocabulary, P positions whose
logits are wanted.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from mllm.adapters import build_adapter
from mllm.adapters.adapter_inputs import KEYWORD
from mllm.compressors import Compressor, Newline, build_compressor
from mllm.encoders import build_encoder
from mllm.hosts import HostDecoder, HostEncoder, build_host, find_family
from mllm.hosts.positions import look_up
from mllm.kv_cache.names import CACHE_NAMES, cache_argument, cache_of, one_cache
from mllm.model.configuration import TOWER_NAMES, ElasticConfig
from mllm.model.expert_losses import adapter_inputs_of, routing_losses_of
from mllm.model.generation import ElasticGenerationMixin
from mllm.model.media_arguments import MEDIA_KEYS, SIZE_KEYS, VALUE_KEYS
from mllm.model.new_tokens import NewTokens
from mllm.model.outputs import ElasticOutput, Features, TargetLoss
from mllm.model.precision import as_weights_of
from mllm.model.splice import check_placeholders, merge, place_in_order
from mllm.model.trainables import is_sharded
from mllm.packing.attention import KEYWORD as PLAN_KEYWORD
from mllm.packing.attention import PackedAttention, is_enabled, packed_mask
from mllm.packing.plan import SegmentPlan


class ElasticPreTrainedModel(PreTrainedModel):
    """Holds what the two model classes share: the config class, and the initialisation of compressors."""

    config_class = ElasticConfig
    config: ElasticConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "video", "text")  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    # Of an export that is loaded in half precision; see `mllm.model.precision`.
    _keep_in_fp32_modules_strict = ["compressors", "newline", "new_tokens", "lora_A", "lora_B"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012 (read by transformers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        is_ours = type(module).__module__.startswith(("mllm.compressors", "mllm.model.new_tokens"))
        if (is_ours or isinstance(module, Compressor)) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]


class ElasticModel(ElasticPreTrainedModel):
    """Runs encoders, compressors and the decoder, without the head.

        pixel_values ─ vision_tower ─┐
        audio_values ─ audio_tower ──┼─ features (N, T, D) ─ compressors[medium] ─ soft tokens (R, K, H) ─┐
        video_values ─ video_tower ──┘   once per item            by each span's own count                │
        input_ids ─ embed_text ───────────────────────────────────────────────────────── merge ── language_model

    A span is one stretch of placeholders in `input_ids`. `*_index` says which encoded item a span shows, so several
    rows, or several budgets of one row, share one encoding; without it span i shows item i. The tiles of an image are
    items and spans of their own; `image_layout` then says which token of which span each placeholder stands for, or
    that it is the learned newline.
    """

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        text = config.text_config
        assert text is not None
        assert config.media is not None
        self.host_decoder: HostDecoder | None = None
        if config.host_config is not None:
            self.set_host(build_host(config.host_config).model)
        else:
            self.language_model = AutoModel.from_config(text, trust_remote_code=False)
            for medium, encoder_config in config.encoder_configs.items():
                block = config.encoded_media[medium].encoder
                setattr(self, TOWER_NAMES[medium], build_encoder(medium, encoder_config, block))
        self.compressors = nn.ModuleDict(
            {
                medium: build_compressor(
                    medium,
                    block,
                    in_size=self.encoder(medium).hidden_size,
                    out_size=text.hidden_size if config.host_config is None else self.encoder(medium).hidden_size,
                    grid=getattr(self.encoder(medium), "grid", None),
                    max_patches=getattr(self.encoder(medium), "max_patches", None),
                )
                for medium, block in config.encoded_media.items()
            }
        )
        tiling = config.media["image"].tiling if "image" in config.media else None
        self.newline = Newline(text.hidden_size) if tiling is not None and tiling.newline else None
        self.new_tokens = _new_tokens(config)
        self.post_init()

    def set_host(self, body: Any) -> None:
        """Take a host's body (its model without the head) for the LLM and the encoder."""
        encoder = HostEncoder(body)
        self.language_model = getattr(body, encoder.family.decoder)
        self.host_decoder = None if encoder.family.channels is None else HostDecoder(body)
        setattr(self, TOWER_NAMES[encoder.family.medium], encoder)

    def encoder(self, medium: str) -> Any:
        """Return the encoder of a medium."""
        return getattr(self, TOWER_NAMES[medium])

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embed token ids (B, S) as (B, S, H): by the LLM's own embedding, and new tokens by their own rows.

        Where a host's decoder reads more of a token, that stands behind (see `mllm.hosts.channels`).
        """
        embed = self.get_input_embeddings()
        if self.host_decoder is not None:
            return self.host_decoder.of_text(input_ids, embed(input_ids))
        return embed(input_ids) if self.new_tokens is None else self.new_tokens(input_ids, embed)

    def encode(self, medium: str, values: Tensor, lengths: Tensor | None = None) -> Features:
        """Run a medium's encoder once; without gradient unless something in it trains.

        Args:
            values: raw input of the encoder, items first; of any floating dtype.
            lengths: (N,) true raw lengths of a stream; (N, 2) grids of images that keep their shape, with more behind
                them where a host reads maps.

        Returns:
            Features in the dtype of the medium's compressor.
        """
        encoder = self.encoder(medium)
        trains = any(parameter.requires_grad for parameter in encoder.parameters())
        values = as_weights_of(encoder, values)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            if medium == "image" and lengths is None:
                features = encoder(values)
                counts = features.new_full(features.shape[:1], features.shape[1], dtype=torch.int64)
            else:
                features, counts = encoder(values, lengths)
            features = as_weights_of(self.compressors[medium], features)
        grids = lengths[:, :2] if medium == "image" and lengths is not None else None
        return Features(features, counts, grids=grids)

    def compress(
        self,
        medium: str,
        features: Features,
        *,
        num_tokens: Tensor,
        rates: Tensor | None = None,
        index: Tensor | None = None,
        max_tokens: int,
        groups: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Compress features to the soft tokens of every span at its own budget.

        Args:
            num_tokens: (R,) soft tokens of each span.
            rates: (R,) frames per token, 0 where a count was asked for; None for images.
            index: (R,) the encoded item of each span; None means that span i shows item i. Items may have no span.
            max_tokens: an upper bound of `num_tokens` known on the host.
            groups: see `Compressor.compress_spans`, which then computes spans with an index.

        Returns:
            (R, K, H) with K = max_tokens, zero beyond each span's own count.
        """
        values, lengths = features.values, features.lengths
        grids = {} if features.grids is None else {"grids": features.grids}
        rates = torch.zeros_like(num_tokens) if rates is None else rates
        if groups and is_sharded(self.compressors[medium]):
            # Weights are gathered at every call, and all processes must call equally often: those without groups, once.
            max_tokens, groups = max(most for _, most in groups), ()
        if groups:
            assert index is not None
            compressor = cast(Compressor, self.compressors[medium])
            return compressor.compress_spans(
                values, lengths, index, tokens=num_tokens, rates=rates, groups=groups, **grids
            )
        shown = slice(len(num_tokens)) if index is None else index
        values, lengths = values[shown], lengths[shown]
        grids = {name: grid[shown] for name, grid in grids.items()}
        return self.compressors[medium](values, lengths, tokens=num_tokens, rates=rates, max_tokens=max_tokens, **grids)

    def get_image_features(
        self,
        pixel_values: Tensor,
        num_image_tokens: Tensor,
        image_index: Tensor | None = None,
        image_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Compute soft tokens of images: `pooler_output` is a list of (n_i, H), one per span."""
        return self._features_output("image", pixel_values, image_grids, num_image_tokens, None, image_index)

    def get_audio_features(
        self,
        audio_values: Tensor,
        audio_lengths: Tensor,
        num_audio_tokens: Tensor,
        audio_rates: Tensor | None = None,
        audio_index: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Compute soft tokens of audio clips: `pooler_output` is a list of (n_i, H), one per span."""
        return self._features_output("audio", audio_values, audio_lengths, num_audio_tokens, audio_rates, audio_index)

    def get_video_features(
        self,
        video_values: Tensor,
        video_lengths: Tensor,
        num_video_tokens: Tensor,
        video_rates: Tensor | None = None,
        video_index: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Compute soft tokens of videos: `pooler_output` is a list of (n_i, H), one per span."""
        return self._features_output("video", video_values, video_lengths, num_video_tokens, video_rates, video_index)

    def _features_output(
        self,
        medium: str,
        values: Tensor,
        lengths: Tensor | None,
        num_tokens: Tensor,
        rates: Tensor | None,
        index: Tensor | None,
    ) -> BaseModelOutputWithPooling:
        features = self.encode(medium, values, lengths)
        counts = num_tokens.tolist()
        soft = self.compress(medium, features, num_tokens=num_tokens, rates=rates, index=index, max_tokens=max(counts))
        spans = [tokens[:count] for tokens, count in zip(soft, counts, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=features.values, pooler_output=spans)  # pyright: ignore

    def embed(
        self,
        input_ids: Tensor,
        media: Mapping[str, Tensor | None],
        *,
        plan: SegmentPlan | None = None,
        features: Mapping[str, Features] | None = None,
    ) -> Tensor:
        """Embed text and put the soft tokens of all media in their places.

        Args:
            input_ids: (B, S), one placeholder id per soft token.
            media: the media arguments of `forward` by name.
            plan: where soft tokens go in a packed row.
            features: what `encode` gave before, by medium; the others are encoded.

        Returns:
            (B, S, H).

        Raises:
            ValueError: placeholders without soft tokens, or the reverse.
        """
        placeholder_ids = self.config.placeholder_ids or {}
        masks = {medium: input_ids == placeholder_ids[medium] for medium in self.compressors}
        text_ids = input_ids
        for mask in masks.values():  # a placeholder id may lie beyond the LLM's vocabulary
            text_ids = text_ids.masked_fill(mask, 0)
        embeds = self.embed_text(text_ids)
        for medium, mask in masks.items():
            values = media.get(VALUE_KEYS[medium])
            num_tokens = media.get(f"num_{medium}_tokens")
            layout = media.get(f"{medium}_layout") if plan is None else plan.layouts.get(medium)
            self._check(medium, input_ids, num_tokens, layout)
            known = (features or {}).get(medium)
            if num_tokens is not None and known is None and values is not None:
                known = self.encode(medium, values, media.get(SIZE_KEYS[medium]))
            if num_tokens is not None and known is not None:
                soft = self.compress(
                    medium,
                    known,
                    num_tokens=num_tokens,
                    rates=media.get(f"{medium}_rates"),
                    index=media.get(f"{medium}_index"),
                    max_tokens=self._most_tokens(medium, known, input_ids.shape[1]),
                    groups=() if plan is None else plan.groups[medium],
                )
                if self.host_decoder is not None:
                    soft = self.host_decoder.of_soft(soft)
                if layout is None:
                    embeds = merge(embeds, mask, soft, num_tokens)
                else:
                    newline = self._newline() if medium == "image" else None
                    embeds = place_in_order(embeds, mask, soft, layout, newline)
            elif self.training and _is_distributed():
                embeds = embeds + 0.0 * self._touch(medium).to(embeds.dtype)
        is_placed = media.get("image_layout") is not None if plan is None else "image" in plan.layouts
        if self.newline is not None and not is_placed and self.training and _is_distributed():
            embeds = embeds + 0.0 * self.newline().sum().to(embeds.dtype)
        return embeds

    def _newline(self) -> Tensor | None:
        """Return what ends the rows of images (H,): a host's own, or the learned one."""
        if self.config.host_config is not None:
            return self.encoder("image").newline
        return None if self.newline is None else self.newline()

    def _most_tokens(self, medium: str, features: Features, length: int) -> int:
        """Bound the tokens of one item from above, so that many short spans in a long row stay small."""
        if medium != "image":
            return length
        queries = self.config.encoded_media[medium].num_queries
        return min(length, max(features.values.shape[1], queries))

    def _check(self, medium: str, input_ids: Tensor, num_tokens: Tensor | None, layout: Tensor | None) -> None:
        # On a device the host has checked the batch before the transfer; asking again would make the host wait.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = torch.zeros(0, dtype=torch.int64) if num_tokens is None else num_tokens
            counts = counts if layout is None else len(layout)
            check_placeholders(input_ids, (self.config.placeholder_ids or {})[medium], counts, medium)

    def _touch(self, medium: str) -> Tensor:
        """Compute a scalar that depends on every parameter of a branch this rank has no input for.

        Without it a rank that lacks a medium skips the branch's collectives, and the others wait for ever.
        """
        encoder = self.encoder(medium)
        parameter = next(encoder.parameters())
        values, lengths = encoder.smallest_input()
        features = self.encode(
            medium, values.to(parameter.device), None if lengths is None else lengths.to(parameter.device)
        )
        one = features.lengths.new_ones(1)
        soft = self.compress(medium, features, num_tokens=one, rates=None, max_tokens=1)
        return soft.sum()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        features: Mapping[str, Features] | None = None,
        plan: SegmentPlan | None = None,
        prompt_positions: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embed, splice and run the decoder. The media arguments are those of `ElasticForConditionalGeneration`."""
        media = {key: kwargs.pop(key, None) for key in MEDIA_KEYS}
        cache = one_cache(cache, past_key_values)
        if prompt_positions is not None:
            numbers = _numbers(position_ids, attention_mask, cache)
            position_ids = look_up(prompt_positions, numbers)
        decoder: Any = self.language_model
        if self.host_decoder is not None:
            reads_text = inputs_embeds is None and not features and all(value is None for value in media.values())
            decoder = partial(self.host_decoder, reads_text=reads_text)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds; got neither")
            inputs_embeds = self.embed(input_ids, media, plan=plan, features=features)
        return decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            **kwargs,
        )


class ElasticForConditionalGeneration(ElasticPreTrainedModel, ElasticGenerationMixin):
    """Puts the LLM's own head on the elastic model. See `ElasticModel` for the drawing of the forward pass.

    Raises:
        ValueError: an LLM whose head scales its logits in a way this class does not reproduce.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        text = config.text_config
        assert text is not None
        # A host's head is taken as it is; `mllm adopt` compares its logits.
        for key in ("logits_scaling", "logit_scale") if config.host_config is None else ():
            if getattr(text, key, None) not in (None, 1, 1.0):
                raise ValueError(f"text_config.{key} of {text.model_type} is not supported; use a Llama, Qwen or Gemma")
        self.model = ElasticModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.holds_adapter:
            build_adapter(self.model.language_model, config.adapter)
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
        """Compute logits (..., V) of hidden states (..., H), as the LLM's own class computes them."""
        lm_head: Any = self.lm_head
        logits = lm_head(hidden)
        # Most hosts have heads of their own, which cap nothing, whatever their LLM alone would do.
        host = self.config.host_config
        caps = host is None or find_family(host.model_type, reference="the host").caps_logits
        cap = getattr(self.config.text_config, "final_logit_softcapping", None) if caps else None
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
        target_loss: TargetLoss | None = None,
        prompt_positions: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> ElasticOutput:
        """Run rows that may differ in media and in budgets.

        Args:
            input_ids: (B, S), one placeholder id per soft token of a span.
            labels: (B, S), -100 where nothing is to be learned; gives `loss`, the mean over target tokens (or their
                sum over `num_items_in_batch` when the trainer passes that).
            logits_to_keep: logits of the last n positions only, or of the given ones; 0 keeps all.
            logit_positions: (P,) flat positions in B*S; the logits are then (P, V) and nothing else is computed.
            pixel_values: (N, 3, h, w); or (N, P, values of a patch) with image_grids (N, 2), the rows and columns of
                each image, where images keep their shape. num_image_tokens: (R,). image_index: (R,) item of each
                span. image_layout: (P, 2) of each placeholder the span and the position in it, or -1 for a newline,
                where images are cut into tiles.
            audio_values: (N, ...) with audio_lengths (N,) in raw samples; num_audio_tokens, audio_rates: (R,).
            video_values: (N, T, 1, h, w) with video_lengths (N,) in frames; num_video_tokens, video_rates: (R,).
            scale_ids, task_ids: (B,) which experts of the adapter each row uses; -1 for the shared one alone.
            adapter_report: give the adapter's `balance` and `expert_usage`, where it has experts; as in training by
                default. What a mixture of projectors reports is given in training.
            plan: how rows are packed; the shapes above then have B = 1, `scale_ids` and `task_ids` are (1, S), and
                reports are by row. See `mllm.packing.pack`.
            packed_attention: what computes the attention of packed rows.
            features: by medium what `ElasticModel.encode` gave; those media are not encoded.
            prompt_positions: (B, P, 3) where the tokens of each row stand, for hosts whose positions have three
                dimensions; see `mllm.hosts.positions`.
            target_loss: computes the loss of the hidden states at `logit_positions`; there are no logits then.
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
        adapter_inputs = adapter_inputs_of(
            self.config,
            input_ids,
            attention_mask,
            scale_ids=scale_ids,
            task_ids=task_ids,
            with_report=with_report,
            plan=plan,
        )
        if adapter_inputs is not None:
            kwargs[KEYWORD] = adapter_inputs
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
            prompt_positions=prompt_positions,
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
        logits = loss = budget_losses = target_states = None
        if target_loss is not None:
            loss, budget_losses = target_loss(self.head, hidden)
            target_states = hidden.detach()
        else:
            logits = self.head(hidden)
        if labels is not None:
            assert logits is not None
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items)
        collector = None if adapter_inputs is None else adapter_inputs.collector
        balance, usage = ([], []) if collector is None else collector.take()
        placeholder_ids = self.config.placeholder_ids or {}
        auxiliary = routing_losses_of(self.model.compressors, placeholder_ids, input_ids, media, plan)
        if balance:
            auxiliary["balance"] = torch.stack(balance).mean(dim=0)
        return ElasticOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary=auxiliary or None,
            expert_usage=torch.stack(usage) if usage else None,
            budget_losses=budget_losses,
            target_states=target_states,
            **cache_argument(cache_of(outputs)),
        )


def _new_tokens(config: ElasticConfig) -> NewTokens | None:
    text: Any = config.text_config
    ids = tuple((config.new_tokens or {}).values())
    std = getattr(text, "initializer_range", 0.02)
    return NewTokens(ids, size=text.hidden_size, std=std) if ids else None


def _numbers(position_ids: Tensor | None, attention_mask: Any, cache: Any) -> Tensor:
    """Number the tokens of a pass in their rows (B, L), where nothing says the numbers: by the mask of all tokens.

    Raises:
        ValueError: there is no such mask either.
    """
    if position_ids is not None:
        return position_ids
    if attention_mask is None:
        raise ValueError("prompt_positions goes with attention_mask or position_ids; got neither")
    num_read = 0 if cache is None else cache.get_seq_length()
    return (attention_mask.long().cumsum(dim=-1) - 1)[:, num_read:]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
