"""Quantized layers by themselves, as training and as inference compute them."""

import pytest
import torch
from torch import nn

from quantformer_hf.layers import QuantConv2d
from quantformer_hf.packed_layers import packed_form
from quantformer_hf.quantizers import ActivationQuantizer, build_weight_quantizer


def packed(layer):
    made = packed_form(layer).eval()
    made.weight_quantizer.fill(layer.weight, layer.weight_quantizer)
    return made


def make_convolution(**arguments):
    conv = nn.Conv2d(4, 6, 4, **arguments)
    weights, inputs = build_weight_quantizer("lsq", 4, 6), ActivationQuantizer(8, "conv", calibrated=True)
    weights.calibrate(conv.weight)
    inputs.scale.data.fill_(8 / 255)
    inputs.offset.data.fill_(-4)
    return QuantConv2d.from_float(conv, weights, inputs).eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 4},
        {"stride": 2},
        *({"stride": 4} | more for more in ({"padding": 2}, {"dilation": 2}, {"groups": 2})),
    ],
)
def test_inference_cuts_an_image_where_a_convolution_does(arguments):
    # Of a size that is no multiple of the windows'.
    layer, x = make_convolution(**arguments), torch.randn(2, 4, 18, 17)
    # With gradients, in floating point.
    expected = layer(x).detach()
    with torch.no_grad():
        for made in (layer, packed(layer)):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)


def test_a_packed_layer_whose_input_was_never_calibrated_says_so():
    layer = packed(make_convolution(stride=4))
    layer.input_quantizer.calibrated = False
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer 'conv' was not calibrated: run model\.calibrate"):
        layer(torch.randn(2, 4, 16, 16))
