"""Integer arithmetic of quantized models: kernels for CPUs, and the same in plain torch."""

from . import operators, reference
from .arithmetic import fake_quantized, in_integers, infers
from .info import describe_device, describe_layer
from .library import instruction_set, using
from .plans import STEP, ChannelPlan, LinearPlan, TokenPlan, plan_channels, plan_linear, plan_weight
from .remembered import Remembered, state_of


__all__ = [
    "STEP",
    "ChannelPlan",
    "LinearPlan",
    "Remembered",
    "TokenPlan",
    "describe_device",
    "describe_layer",
    "fake_quantized",
    "in_integers",
    "infers",
    "instruction_set",
    "operators",
    "plan_channels",
    "plan_linear",
    "plan_weight",
    "reference",
    "state_of",
    "using",
]
