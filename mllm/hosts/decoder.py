"""Runs the decoder of a host that reads more of a token than its embedding.

Knows a host's body and its family. Does not know where embeddings come from.

Shapes: B rows, S positions, R spans, K soft tokens of the longest, H the LLM's hidden size, E extra channels.
"""

from typing import Any

from torch import Tensor

from mllm.hosts.channels import Channels
from mllm.hosts.families import find_family


class HostDecoder:
    """Puts the extra channels of tokens behind their embeddings, and takes them off again before the decoder.

    It is no module: the host's parts stand where they are, and this refers to them.

    Args:
        body: the host without its head, of a family with extra channels.
    """

    def __init__(self, body: Any) -> None:
        family = find_family(body.config.model_type, reference="the host")
        assert family.channels is not None
        self.channels: Channels = family.channels
        self.decoder_name = family.decoder
        self.body = body
        self.hidden_size = int(body.config.get_text_config().hidden_size)

    def of_text(self, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """Widen embeddings of text: (B, S), (B, S, H) -> (B, S, H + E)."""
        return self.channels.of_text(self.body, input_ids, embeds)

    def of_soft(self, soft: Tensor) -> Tensor:
        """Widen what a compressor gave to (R, K, H + E)."""
        return self.channels.of_soft(self.body, soft)

    def __call__(
        self, *, inputs_embeds: Tensor, attention_mask: Any, reads_text: bool, position_ids: Any, **kwargs: Any
    ) -> Any:
        """Run the decoder on widened embeddings (B, S, H + E).

        Args:
            reads_text: there is no soft token in this pass.
            kwargs: of the decoder.

        Raises:
            ValueError: a mask that is made already, for a host whose images see themselves in both directions.
        """
        embeds, extra = inputs_embeds[..., : self.hidden_size], inputs_embeds[..., self.hidden_size :]
        keywords = self.channels.keywords(self.body, extra, reads_text=reads_text)
        if (
            not self.channels.is_causal
            and not reads_text
            and (isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2))
        ):
            raise ValueError(
                f"{self.body.config.model_type} makes its own attention masks, so a static cache does not go with it"
            )
        runs = self.body if self.channels.runs_body else getattr(self.body, self.decoder_name)
        if position_ids is not None:
            position_ids = position_ids + self.channels.first_position
        return runs(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **keywords, **kwargs
        )
