"""The hot functions: fake quantization, forward and backward, each compiled once."""

from .activation import PRODUCERS, fake_quantize_groups, fake_quantize_mixture
from .attention import quantize_rows, quantized_attention
from .compiling import eager_functions
from .gradients import scale_gradient
from .scales import positive, widest
from .weight import fake_quantize_rows
from .widths import fake_quantize_widths


__all__ = [
    "PRODUCERS",
    "eager_functions",
    "fake_quantize_groups",
    "fake_quantize_mixture",
    "fake_quantize_rows",
    "fake_quantize_widths",
    "positive",
    "quantize_rows",
    "quantized_attention",
    "scale_gradient",
    "widest",
]
