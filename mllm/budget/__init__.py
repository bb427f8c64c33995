"""Budgets: how they are written, which a model is trained on, what they cost in tokens, and which a step samples."""

from mllm.budget.automatic import Auto, Limit
from mllm.budget.grammar import MEDIA, Amount, Budget, BudgetInput
from mllm.budget.space import NONE, Compression, Extent, MediumSpace, Space, TokenCount, count_tokens

__all__ = [
    "MEDIA",
    "NONE",
    "Amount",
    "Auto",
    "Budget",
    "BudgetInput",
    "Compression",
    "Extent",
    "Limit",
    "MediumSpace",
    "Space",
    "TokenCount",
    "count_tokens",
]
