"""Drop-in modules: a Linear with experts, and the small network that mixes experts."""
from fedms_ext.nn.expert_linear import ExpertLinear, LoRA, PairState
from fedms_ext.nn.gate_adapter import GateAdapter

__all__ = ["ExpertLinear", "GateAdapter", "LoRA", "PairState"]
