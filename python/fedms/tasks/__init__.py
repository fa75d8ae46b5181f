"""What is learned: what an expert says about a sample, its loss, its score, and how two experts are mixed.

Methods, engines, checkpoints and reports know no task. A new one is one file here and a line in `ExpertModel`'s caller, or an
object given to `ExpertModel` as `task=`.
"""
from __future__ import annotations

from .base import Score, Task
from .causal_lm import CausalLM, LogitMixingLM
from .classification import Classification

__all__ = ["CausalLM", "Classification", "LogitMixingLM", "Score", "Task"]
