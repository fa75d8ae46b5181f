"""Drop-in modules: a Linear with experts, one with a quantised weight, and the small network that mixes experts."""
from fedms_ext.nn.expert_linear import ExpertLinear, LoRA, PairState
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.gate_adapter import GateAdapter
from fedms_ext.nn.quantised_weight import QuantisedWeight

__all__ = ["ExpertLinear", "FrozenLinear", "GateAdapter", "LoRA", "PairState", "QuantisedWeight"]
