"""A packed model as plain tensor functions and ONNX's DequantizeLinear, for `torch.export` to trace.

Every quantized layer of the model is replaced by a module of this file. Whatever kernels run a packed model, the graph is
made of the formulas that define it, with the same roundings:

    activations    x̂ = Clip(Round((x - β) * 1/s), 0, 2^b - 1) * s + β      s and β of each channel's group, or, where levels
                                                                           have two step sizes, what `ops/levels.py` does
    weights        ŵ = (DequantizeLinear(q, 1) + shift) * s                 s of each output channel

Two forms that look simpler make engines compute another model (measured 2026-11-24):

- DequantizeLinear with the scale s, straight into a MatMul: ONNX Runtime (1.32) fuses the two into its MatMulNBits, which
  rounds the *other* operand to eight bits, with a scale of its own for every 32 channels. Here the multiplication by s
  stands between the two.
- QuantizeLinear and DequantizeLinear around activations: OpenVINO (2026.4) takes them as leave to multiply in int8. The
  patch embedding then rounds β to a multiple of s, and where the processor has no VNNI, sums of eight-bit weights
  saturate: logits of small models were off by up to half their size. Round and Clip it runs as they stand. ONNX Runtime
  is as fast with either, but 30 times slower where QuantizeLinear has a scale for each channel of the last dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from ..attention import attention_modules
from ..layers import InferenceLayerNorm, InferenceMean, QuantConv2d, QuantLayerNorm, QuantLinear
from ..ops import PRODUCERS
from ..packed_forms import choose_forms
from ..packed_layers import PackedWeight
from ..quantizers import ActivationQuantizer


#: Of DequantizeLinear, the first that knows INT4.
DEQUANTIZE_VERSION = 21


class TraceableActivation(nn.Module):
    """What an `ActivationQuantizer` (frozen, or of one group) computes, producer included.

    Args:
        quantizer: whose scales and offsets are expanded to the channels, if it has groups.
    """

    def __init__(self, quantizer: ActivationQuantizer):
        super().__init__()
        scale, offset = quantizer.step().detach(), quantizer.offset.detach()
        index = getattr(quantizer, "group_index", None)
        if index is not None:
            scale, offset = scale[index.long()], offset[index.long()]
        self.produce = PRODUCERS[quantizer.producer][0]
        self.grid = quantizer.grid
        self.register_buffer("reciprocal", 1 / scale)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("offset", offset.clone())
        first = getattr(quantizer, "class_token", None)
        self.tokens = 0 if first is None else first.tokens
        self.class_token = None if first is None else TraceableActivation(first)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` in and out; where the class token has its own, `(batch, tokens, channels)`."""
        if self.class_token is None:
            return self._quantized(x)
        return torch.cat([self.class_token(x[:, : self.tokens]), self._quantized(x[:, self.tokens :])], 1)

    def _quantized(self, x: Tensor) -> Tensor:
        position = (self.produce(x) - self.offset) * self.reciprocal
        return self.grid.nearest(position) * self.scale + self.offset


class TraceableWeight(nn.Module):
    """What `PackedWeight.dequantized` computes, from codes that a file can hold in the narrowest type of ONNX.

    Attributes:
        bits: of the grid.
        codes: q, of the weight's shape, int8.
    """

    def __init__(self, weight: PackedWeight):
        super().__init__()
        self.bits, self.shift = weight.grid.bits, weight.shift
        self.register_buffer("codes", weight.integers().to(torch.int8).view(weight.shape))
        # `fill` has made it positive.
        self.register_buffer("scale", weight.scale.detach().view(-1, *[1] * (len(weight.shape) - 1)).clone())

    def forward(self) -> Tensor:
        """`(out, in)` or `(out, in, height, width)`."""
        levels = symbolic(
            "DequantizeLinear",
            (self.codes, torch.ones(())),
            dtype=torch.float32,
            shape=self.codes.shape,
            version=DEQUANTIZE_VERSION,
        )
        return (levels + self.shift if self.shift else levels) * self.scale


class _TraceableLayer(nn.Module):
    """Operands and bias of a packed layer; one without a weight quantizer keeps its floating-point weight."""

    def __init__(self, layer: QuantLinear | QuantConv2d):
        super().__init__()
        quantizer = layer.input_quantizer
        self.input_quantizer = nn.Identity() if quantizer is None else TraceableActivation(quantizer)
        packed = isinstance(layer.weight_quantizer, PackedWeight)
        self.packed_weight = TraceableWeight(layer.weight_quantizer) if packed else None
        self.plain_weight = None if packed else layer.weight
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        # The patch embedding is asked for the dtype of its weight.
        return self.plain_weight if self.packed_weight is None else self.packed_weight()


class TraceableLinear(_TraceableLayer):
    """A `QuantLinear` or `PackedLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(self.input_quantizer(x), self.weight, self.bias)


class TraceableConv2d(_TraceableLayer):
    """A `QuantConv2d` or `PackedConv2d`: a patch embedding, without padding."""

    def __init__(self, layer: QuantConv2d):
        super().__init__(layer)
        self.stride = layer.stride

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, height, width)` in and out."""
        return F.conv2d(self.input_quantizer(x), self.weight, self.bias, self.stride)


class TraceableAttention(nn.Module):
    """Both products of an attention block, in the place of its `AttentionOperands`, or without quantizers."""

    def __init__(self, operands: nn.Module | None):
        super().__init__()
        for name in ("query", "key", "value"):
            quantizer = getattr(operands, name, None)
            setattr(self, name, nn.Identity() if quantizer is None else TraceableActivation(quantizer))
        self.probabilities = nn.Identity() if operands is None else operands.probabilities

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results as `ops.quantized_attention`; there is no dropout at inference."""
        scores = torch.matmul(self.query(query) * scaling, self.key(key).transpose(2, 3))
        if mask is not None:
            scores = scores + mask
        probabilities = scores.softmax(-1)
        return torch.matmul(self.probabilities(probabilities), self.value(value)), probabilities


def _plain_norm(layer: InferenceLayerNorm) -> nn.LayerNorm:
    norm = nn.LayerNorm(layer.normalized_shape, eps=layer.eps, bias=layer.bias is not None, device="meta")
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm


def make_traceable(backbone: nn.Module) -> None:
    """Replace, in place, every quantized part of a packed ViT, DeiT or Swin."""
    # Its blocks look into layers that are no longer there.
    choose_forms(backbone, packed=False)
    for module in attention_modules(backbone):
        module.operands = TraceableAttention(getattr(module, "operands", None))
    for name, module in list(backbone.named_modules()):
        if isinstance(module, QuantLinear):
            backbone.set_submodule(name, TraceableLinear(module))
        elif isinstance(module, QuantConv2d):
            backbone.set_submodule(name, TraceableConv2d(module))
        elif isinstance(module, QuantLayerNorm):
            norm = nn.Sequential(_plain_norm(module), TraceableActivation(module.output_quantizer))
            backbone.set_submodule(name, norm)
        elif isinstance(module, InferenceLayerNorm):
            backbone.set_submodule(name, _plain_norm(module))
        elif isinstance(module, InferenceMean):
            backbone.set_submodule(name, nn.AdaptiveAvgPool1d(1))
        elif isinstance(getattr(module, "input_quantizer", None), ActivationQuantizer):
            # Swin's attention block, whose hook asks for it by this name. Its readers are no longer packed.
            module.input_quantizer, module.gives_codes = TraceableActivation(module.input_quantizer), False
