"""Drop-in modules: a Linear with experts, one with a quantized weight, the small network that mixes experts, attention, a norm."""
from fedms_ext.nn.attention import use_attention
from fedms_ext.nn.expert_linear import ExpertLinear
from fedms_ext.nn.frozen_linear import FrozenLinear
from fedms_ext.nn.gate_adapter import GateAdapter
from fedms_ext.nn.lora import LoRA, PairState
from fedms_ext.nn.quantized_weight import QuantizedWeight
from fedms_ext.nn.rms_norm import use_rms_norm

__all__ = ["ExpertLinear", "FrozenLinear", "GateAdapter", "LoRA", "PairState", "QuantizedWeight", "use_attention",
           "use_rms_norm"]
