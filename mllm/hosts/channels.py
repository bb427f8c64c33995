"""Carries what a decoder reads of a token beside its embedding as more channels behind it.

Prompts are cut, shared, repeated for beams and read in parts; whatever happens to the embeddings of tokens then happens
to these values too, and nothing else has to know of them. `mllm.hosts.decoder` takes them apart right before the
decoder runs.

Knows bodies and configs of hosts. Does not know budgets, or which tokens of a row are soft.

Shapes: B rows, S positions, R spans, K soft tokens of the longest, H the LLM's hidden size, E extra channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Channels:
    """Says what stands in the extra channels of a family. By default there is none."""

    def num_levels(self, config: Any) -> int:
        """Count the levels of the encoder whose features stand behind those of its output, H each."""
        return 0

    def size(self, config: Any) -> int:
        """Count the extra channels, E."""
        raise NotImplementedError

    def of_text(self, body: Any, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """Put the extra channels of text behind its embeddings; (B, S), (B, S, H) -> (B, S, H + E)."""
        return functional.pad(embeds, (0, self.size(body.config)))

    def of_soft(self, body: Any, soft: Tensor) -> Tensor:
        """Put the extra channels of soft tokens behind what the compressor gave; -> (R, K, H + E)."""
        return soft

    def keywords(self, body: Any, extra: Tensor, *, reads_text: bool) -> dict[str, Any]:
        """Make of extra channels (B, S, E) what the host's body, or its decoder, is called with.

        Args:
            reads_text: there is no soft token in this pass.
        """
        raise NotImplementedError

    @property
    def first_position(self) -> int:
        """The position of the first token of a prompt."""
        return 0

    @property
    def runs_body(self) -> bool:
        """Whether the host's body runs the decoder, making the attention masks for it; else the decoder alone runs."""
        return False

    @property
    def is_causal(self) -> bool:
        """Whether no token sees what stands behind it, so that a prompt can be cut anywhere."""
        return True


@dataclass(frozen=True)
class Levels(Channels):
    """Features of several layers of the encoder, which are added in the first layers of the decoder (DeepStack)."""

    def num_levels(self, config: Any) -> int:
        """See `Channels.num_levels`."""
        return len(config.vision_config.deepstack_visual_indexes)

    def size(self, config: Any) -> int:
        """See `Channels.size`."""
        return self.num_levels(config) * int(config.get_text_config().hidden_size)

    def keywords(self, body: Any, extra: Tensor, *, reads_text: bool) -> dict[str, Any]:
        """See `Channels.keywords`; text has zeros, which add nothing."""
        if reads_text:
            return {}
        levels = extra.flatten(0, 1).chunk(self.num_levels(body.config), dim=-1)
        everywhere = torch.ones(extra.shape[:2], dtype=torch.bool, device=extra.device)
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": list(levels)}


@dataclass(frozen=True)
class TokenTypes(Channels):
    """A channel that is 1 at soft tokens: those of one image see each other, in both directions.

    Args:
        keyword: by which the host's body takes the types.
    """

    keyword: str

    def size(self, config: Any) -> int:
        """See `Channels.size`."""
        return 1

    def of_soft(self, body: Any, soft: Tensor) -> Tensor:
        """See `Channels.of_soft`."""
        return functional.pad(soft, (0, 1), value=1.0)

    def keywords(self, body: Any, extra: Tensor, *, reads_text: bool) -> dict[str, Any]:
        """See `Channels.keywords`."""
        return {} if reads_text else {self.keyword: (extra[..., -1] > 0).long()}

    @property
    def runs_body(self) -> bool:
        """See `Channels.runs_body`."""
        return True

    @property
    def is_causal(self) -> bool:
        """See `Channels.is_causal`."""
        return False


@dataclass(frozen=True)
class PrefixTypes(TokenTypes):
    """A channel that is 1 behind the prompt: what comes before, an image and a question, is read in both directions.

    A prompt ends with a line break, and an answer has none, which the chat encoder sees to.

    Args:
        break_id: of the line break.
    """

    break_id: int

    def of_text(self, body: Any, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """See `Channels.of_text`."""
        breaks_from_here = (input_ids == self.break_id).flip(1).cumsum(dim=1).flip(1)
        return torch.cat([embeds, (breaks_from_here == 0).to(embeds.dtype)[..., None]], dim=-1)

    def of_soft(self, body: Any, soft: Tensor) -> Tensor:
        """See `Channels.of_soft`."""
        return functional.pad(soft, (0, 1))

    @property
    def first_position(self) -> int:
        """See `Channels.first_position`."""
        return 1


@dataclass(frozen=True)
class PerLayerInputs(TokenTypes):
    """Embeddings of a token's id for every layer, where a member of the family has them; and types behind them.

    A soft token has those of the padding id, as in the host.
    """

    def size(self, config: Any) -> int:
        """See `Channels.size`."""
        text = config.get_text_config()
        return int(text.num_hidden_layers * (text.hidden_size_per_layer_input or 0)) + 1

    def of_text(self, body: Any, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """See `Channels.of_text`."""
        if self.size(body.config) > 1:
            embeds = torch.cat([embeds, _per_layer(body, input_ids).to(embeds.dtype)], dim=-1)
        return functional.pad(embeds, (0, 1))

    def of_soft(self, body: Any, soft: Tensor) -> Tensor:
        """See `Channels.of_soft`."""
        if self.size(body.config) > 1:
            pad_id = int(body.config.get_text_config().pad_token_id)
            of_padding = _per_layer(body, torch.full((1, 1), pad_id, device=soft.device))
            soft = torch.cat([soft, of_padding.to(soft.dtype).expand(*soft.shape[:2], -1)], dim=-1)
        return super().of_soft(body, soft)

    def keywords(self, body: Any, extra: Tensor, *, reads_text: bool) -> dict[str, Any]:
        """See `Channels.keywords`."""
        keywords = super().keywords(body, extra, reads_text=reads_text)
        if (size := self.size(body.config) - 1) > 0:
            num_layers = int(body.config.get_text_config().num_hidden_layers)
            keywords["per_layer_inputs"] = extra[..., :size].unflatten(-1, (num_layers, -1))
        return keywords


def _per_layer(body: Any, input_ids: Tensor) -> Tensor:
    """Look ids up for every layer, and lay the layers side by side."""
    return body.language_model.get_per_layer_inputs(input_ids, None).flatten(2)
