"""The body of the elastic model: encoders, compressors and an unmodified decoder LLM. `model/modeling.py` adds the
head.

Knows tensors and counts. Does not know paths, text, budgets as words, or which budgets a step draws.

Shapes: B rows, S positions, N encoded media items, R placeholder runs, T features of the longest item,
K soft tokens of the longest run, D an encoder's feature size, H the LLM's hidden size, V its vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from mllm.adapters.adapter_inputs import KINDS_WITH_INPUTS, TOKEN_KINDS, AdapterInputs, Collector
from mllm.budget import MEDIA
from mllm.budget import SETTINGS as SPACE_SETTINGS
from mllm.budget.tiling import Tiling
from mllm.compressors import SETTINGS as COMPRESSOR_SETTINGS
from mllm.compressors import Compressor, Newline, build_compressor
from mllm.encoders import SETTINGS as ENCODER_SETTINGS
from mllm.encoders import build_encoder
from mllm.kv_cache.names import cache_argument, one_cache
from mllm.model.base import ElasticPreTrainedModel
from mllm.model.configuration import TOWER_NAMES, ElasticConfig
from mllm.model.new_tokens import NewTokens
from mllm.model.precision import as_weights_of
from mllm.model.router_losses import losses_of_routing
from mllm.model.splice import check_runs, merge, place
from mllm.model.trainables import is_sharded
from mllm.packing.plan import SegmentPlan

VALUE_KEYS = {"image": "pixel_values", "audio": "audio_values", "video": "video_values"}
SIZE_KEYS = {"image": "image_grids", "audio": "audio_lengths", "video": "video_lengths"}
"""What says how large each raw item truly is; images need it where they keep their shape."""
# What the forward pass takes per medium, beside the raw values.
MEDIA_KEYS = (
    *("pixel_values", "image_grids", "num_image_tokens", "image_index", "image_layout"),
    *(f"{medium}_{name}" for medium in ("audio", "video") for name in ("values", "lengths", "rates", "index")),
    *("num_audio_tokens", "num_video_tokens"),
)


@dataclass(frozen=True)
class Features:
    """What an encoder gave: values (N, T, D) and the true lengths (N,) of the items; grids (N, 2) where they differ."""

    values: Tensor
    lengths: Tensor
    grids: Tensor | None = None


class ElasticModel(ElasticPreTrainedModel):
    """Encoders, compressors and the decoder, without the head.

        pixel_values ─ vision_tower ─┐
        audio_values ─ audio_tower ──┼─ features (N, T, D) ─ compressors[medium] ─ soft tokens (R, K, H) ─┐
        video_values ─ video_tower ──┘   once per item            by each run's own count                 │
        input_ids ─ words ────────────────────────────────────────────────────────────── merge ── language_model

    A run is one stretch of placeholders in `input_ids`. `*_index` says which encoded item a run shows, so several
    rows, or several budgets of one row, share one encoding; without it run i shows item i. The tiles of an image are
    items and runs of their own; `image_layout` then says which token of which run each placeholder stands for, or that
    it is the learned newline.
    """

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        text = config.text_config
        assert text is not None
        assert config.media is not None
        self.language_model = AutoModel.from_config(text, trust_remote_code=False)
        for medium, encoder_config in config.encoder_configs.items():
            _check_settings(medium, config.media[medium])
            setattr(self, TOWER_NAMES[medium], build_encoder(medium, encoder_config, config.media[medium]))
        self.compressors = nn.ModuleDict(
            {
                medium: build_compressor(
                    medium,
                    config.media[medium],
                    in_size=self.tower(medium).hidden_size,
                    out_size=text.hidden_size,
                    grid=getattr(self.tower(medium), "grid", None),
                    max_patches=getattr(self.tower(medium), "max_patches", None),
                )
                for medium in config.encoder_configs
            }
        )
        own_tiling = _tiling(config)
        self.newline = Newline(text.hidden_size) if own_tiling is not None and own_tiling.newline else None
        self.new_tokens = _new_tokens(config)
        self.post_init()

    def tower(self, medium: str) -> Any:
        """The encoder of a medium."""
        return getattr(self, TOWER_NAMES[medium])

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def words(self, input_ids: Tensor) -> Tensor:
        """Embed token ids (B, S) as (B, S, H): by the LLM's own embedding, and new tokens by their own rows."""
        embed = self.get_input_embeddings()
        return embed(input_ids) if self.new_tokens is None else self.new_tokens(input_ids, embed)

    def encode(self, medium: str, values: Tensor, lengths: Tensor | None = None) -> Features:
        """Run a medium's encoder once; without gradient unless something in it trains.

        Args:
            values: raw input of the encoder, items first; of any floating dtype.
            lengths: (N,) true raw lengths of a stream; (N, 2) grids of images that keep their shape.

        Returns:
            Features in the dtype of the medium's compressor.
        """
        tower = self.tower(medium)
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        values = as_weights_of(tower, values)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            if medium == "image" and lengths is None:
                features = tower(values)
                counts = features.new_full(features.shape[:1], features.shape[1], dtype=torch.int64)
            else:
                features, counts = tower(values, lengths)
            features = as_weights_of(self.compressors[medium], features)
        return Features(features, counts, grids=lengths if medium == "image" else None)

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
        """Soft tokens of every run at its own budget.

        Args:
            num_tokens: (R,) soft tokens of each run.
            rates: (R,) frames per token, 0 where a count was asked; nothing for images.
            index: (R,) the encoded item of each run; nothing means one run per item.
            max_tokens: an upper bound of `num_tokens` known on the host.
            groups: see `Compressor.compress_spans`, which then computes runs with an index.

        Returns:
            (R, K, H) with K = max_tokens, zero beyond each run's own count.
        """
        values, lengths = features.values, features.lengths
        own = {} if features.grids is None else {"grids": features.grids}
        if groups and is_sharded(self.compressors[medium]):
            # Weights are gathered at every call, and all processes must call equally often: those without groups, once.
            max_tokens, groups = max(most for _, most in groups), ()
        if groups:
            assert index is not None
            rates = torch.zeros_like(num_tokens) if rates is None else rates
            compressor = cast(Compressor, self.compressors[medium])
            return compressor.compress_spans(
                values, lengths, index, tokens=num_tokens, rates=rates, groups=groups, **own
            )
        if index is not None:
            values, lengths = values[index], lengths[index]
            own = {name: grids[index] for name, grids in own.items()}
        rates = torch.zeros_like(num_tokens) if rates is None else rates
        return self.compressors[medium](values, lengths, tokens=num_tokens, rates=rates, max_tokens=max_tokens, **own)

    def get_image_features(
        self,
        pixel_values: Tensor,
        num_image_tokens: Tensor,
        image_index: Tensor | None = None,
        image_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Soft tokens of images: `pooler_output` is a list of (n_i, H), one per run."""
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
        """Soft tokens of audio clips: `pooler_output` is a list of (n_i, H), one per run."""
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
        """Soft tokens of videos: `pooler_output` is a list of (n_i, H), one per run."""
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
        runs = [tokens[:count] for tokens, count in zip(soft, counts, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=features.values, pooler_output=runs)  # pyright: ignore

    def embed(
        self,
        input_ids: Tensor,
        media: Mapping[str, Tensor | None],
        *,
        plan: SegmentPlan | None = None,
        features: Mapping[str, Features] | None = None,
    ) -> Tensor:
        """Text embeddings with the soft tokens of all media in place.

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
        embeds = self.words(text_ids)
        for medium, mask in masks.items():
            values = media.get(VALUE_KEYS[medium])
            num_tokens = media.get(f"num_{medium}_tokens")
            layout = media.get(f"{medium}_layout") if plan is None else plan.layouts.get(medium)
            self._check(medium, input_ids, num_tokens, layout)
            if values is not None and num_tokens is not None:
                known = (features or {}).get(medium) or self.encode(medium, values, media.get(SIZE_KEYS[medium]))
                soft = self.compress(
                    medium,
                    known,
                    num_tokens=num_tokens,
                    rates=media.get(f"{medium}_rates"),
                    index=media.get(f"{medium}_index"),
                    max_tokens=self._most_tokens(medium, known, input_ids.shape[1]),
                    groups=() if plan is None else plan.groups[medium],
                )
                if layout is None:
                    embeds = merge(embeds, mask, soft, num_tokens)
                else:
                    newline = None if self.newline is None or medium != "image" else self.newline()
                    embeds = place(embeds, mask, soft, layout, newline)
            elif self.training and _is_distributed():
                embeds = embeds + 0.0 * self._touch(medium).to(embeds.dtype)
        is_placed = media.get("image_layout") is not None if plan is None else "image" in plan.layouts
        if self.newline is not None and not is_placed and self.training and _is_distributed():
            embeds = embeds + 0.0 * self.newline().sum().to(embeds.dtype)
        return embeds

    def _most_tokens(self, medium: str, features: Features, length: int) -> int:
        """An upper bound of the tokens of one item, so that many short runs in a long row stay small."""
        if medium != "image":
            return length
        queries = (self.config.media or {})[medium].get("num_queries", 0)
        return min(length, max(features.values.shape[1], queries))

    def _check(self, medium: str, input_ids: Tensor, num_tokens: Tensor | None, layout: Tensor | None) -> None:
        # On a device the host has checked the batch before the transfer; asking again would make the host wait.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = torch.zeros(0, dtype=torch.int64) if num_tokens is None else num_tokens
            counts = counts if layout is None else len(layout)
            check_runs(input_ids, (self.config.placeholder_ids or {})[medium], counts, medium)

    def _touch(self, medium: str) -> Tensor:
        """A scalar that depends on every parameter of a branch this rank has no input for.

        Without it a rank that lacks a medium skips the branch's collectives, and the others wait for ever.
        """
        tower, parameter = self.tower(medium), next(self.tower(medium).parameters())
        values, lengths = tower.smallest_input()
        features = self.encode(
            medium, values.to(parameter.device), None if lengths is None else lengths.to(parameter.device)
        )
        one = features.lengths.new_ones(1)
        soft = self.compress(medium, features, num_tokens=one, rates=None, max_tokens=1)
        return soft.sum()

    def routing_losses(
        self, input_ids: Tensor | None, media: Mapping[str, Tensor | None], plan: SegmentPlan | None = None
    ) -> dict[str, Tensor]:
        """What the mixtures of projectors left behind in this pass, as losses (B,) by name; see `ElasticOutput`."""
        return losses_of_routing(self.compressors, self.config.placeholder_ids or {}, input_ids, media, plan)

    def adapter_inputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        scale_ids: Tensor | None,
        task_ids: Tensor | None,
        *,
        with_report: bool,
        plan: SegmentPlan | None = None,
    ) -> AdapterInputs | None:
        """What the adapter needs to know of the rows; nothing where it asks for nothing.

        Args:
            input_ids: (B, S). attention_mask: (B, S). scale_ids, task_ids: (B,) or (B, S).
            with_report: let it report what its experts did.
            plan: of packed rows.

        Raises:
            ValueError: ids for an adapter that has no experts.
        """
        kind = (self.config.adapter or {}).get("kind", "lora")
        if kind not in KINDS_WITH_INPUTS:
            if scale_ids is not None or task_ids is not None:
                raise ValueError(f"scale_ids and task_ids go with {' or '.join(KINDS_WITH_INPUTS)}, not {kind}")
            return None
        if kind != "mome" or input_ids is None or not with_report:
            return AdapterInputs(scale_ids, task_ids)
        kinds = torch.zeros_like(input_ids)
        for medium, placeholder in (self.config.placeholder_ids or {}).items():
            kinds = kinds.masked_fill(input_ids == placeholder, TOKEN_KINDS.index(medium))
        if attention_mask is not None:
            kinds = kinds.masked_fill(attention_mask == 0, -1)
        return AdapterInputs(scale_ids, task_ids, kinds, Collector(), plan)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        features: Mapping[str, Features] | None = None,
        plan: SegmentPlan | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embed, splice and run the decoder. The media arguments are those of `ElasticForConditionalGeneration`."""
        media = {key: kwargs.pop(key, None) for key in MEDIA_KEYS}
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds; got neither")
            inputs_embeds = self.embed(input_ids, media, plan=plan, features=features)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(one_cache(cache, past_key_values)),
            **kwargs,
        )


def _check_settings(medium: str, settings: Mapping[str, Any]) -> None:
    """A key that no reader of the block knows would be ignored in silence."""
    allowed = (*SPACE_SETTINGS, *COMPRESSOR_SETTINGS, *ENCODER_SETTINGS, "encoder_adapter")
    if unknown := sorted(set(settings) - set(allowed)):
        raise ValueError(f"media.{medium}.{unknown[0]} is not a setting; allowed: {', '.join(allowed)}")


def _new_tokens(config: ElasticConfig) -> NewTokens | None:
    text: Any = config.text_config
    ids = tuple((config.new_tokens or {}).values())
    std = getattr(text, "initializer_range", 0.02)
    return NewTokens(ids, size=text.hidden_size, std=std) if ids else None


def _tiling(config: ElasticConfig) -> Tiling | None:
    return Tiling.from_settings("image", (config.media or {}).get("image", {}))


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


assert set(VALUE_KEYS) == set(MEDIA)
