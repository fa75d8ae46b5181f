"""Drop-in modules: a Linear with experts, a Linear with a quantized weight, the small network that mixes experts, and attention."""
from fedms_ext.nn.attention import use_attention
from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.gate_adapter import GateAdapter
from fedms_ext.nn.lora import LoRA, PairState
from fedms_ext.nn.quantized_weight import QuantizedWeight

__all__ = ["ExpertLinear", "FrozenLinear", "GateAdapter", "LoRA", "PairState", "QuantizedWeight", "use_attention"]
