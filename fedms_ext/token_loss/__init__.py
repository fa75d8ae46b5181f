"""Language models' loss in fixed memory: the log-probability of one token a position under a frozen head."""
from __future__ import annotations

from .head import FrozenHead
from .operator import TokenStatistics, mixture_log_prob, token_log_prob

__all__ = ["FrozenHead", "TokenStatistics", "mixture_log_prob", "token_log_prob"]
