"""The packed model on CUDA: Triton kernels by the interpreter, by what they compile to, and on a GPU where there is one."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batches, make_quantized

from quantformer_hf.kernels import cuda, plans, reference, using
from quantformer_hf.packed_layers import PackedLayer


HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_give_the_bits_of_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "triton_interpreted.py"],
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=540,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_product_uses_integer_tensor_cores_and_fuses_no_rounding(capability):
    # Compiling needs no GPU.
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = cuda.triton_kernels().multiply_kernel
    # Codes that lie in two bytes, and activations above 127.
    constants = {
        "BITS": 3,
        "SHIFTED": True,
        "SPLIT": False,
        "BLOCK_ROWS": 16,
        "BLOCK_OUTPUTS": 64,
        "BLOCK_POSITIONS": 32,
    }
    pointers = {"x": "*u8", "packed": "*u8", "source": "*i32", "spans": "*i32"}
    types = (
        pointers
        | dict.fromkeys(("group_scales", "scale", "bias", "y"), "*fp32")
        | dict.fromkeys(constants, "constexpr")
    )
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    ptx = compile(ASTSource(kernel, signature, constants), target=target, options={"enable_fp_fusion": False}).asm[
        "ptx"
    ]
    assert re.search(r"mma\S*\.s32\.s8\.s8", ptx)
    assert "fma." not in ptx
    assert ".ftz" not in ptx


def make_layer():
    """Codes, weight and plans of a linear layer."""
    torch.manual_seed(0)
    channels = plans.plan_channels(8, torch.ones(2), torch.zeros(2), torch.arange(8) % 2, 255)
    weight = plans.plan_weight(8, 8, -128, 127, 0.5, torch.ones(3))
    return torch.ones(4, 8, dtype=torch.uint8), torch.ones(3, 8, dtype=torch.uint8), weight, channels


@pytest.fixture
def forget():
    """Answers that are remembered for the process are found anew, and so once more after the test."""
    for answer in (cuda.triton_kernels, cuda.reason_against_device):
        answer.cache_clear()
    yield
    for answer in (cuda.triton_kernels, cuda.reason_against_device):
        answer.cache_clear()


@pytest.mark.usefixtures("forget")
def test_without_triton_plain_torch_serves_with_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "quantformer_hf.kernels.triton_kernels", None)
    codes, packed, weight, channels = make_layer()
    arguments = (weight.columns, weight.bits, weight.largest_code, weight.multiplier, weight.addend, channels.source)
    arguments += (channels.group_ends, channels.group_scales, channels.largest, weight.scale, torch.zeros(3))
    for _ in range(2):
        assert torch.equal(cuda.multiply(codes, packed, *arguments), reference.multiply(codes, packed, *arguments))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "triton cannot be imported" in cuda.reason_against(weight, channels, torch.device("cuda"))


def test_sums_that_may_not_fit_into_32_bits_stay_in_plain_torch(monkeypatch):
    monkeypatch.setattr(cuda, "reason_against_device", lambda device: None)
    _, _, weight, channels = make_layer()
    assert cuda.reason_against(weight, channels, torch.device("cuda")) is None
    # 255 * 255 * 33026 > 2^31.
    long = plans.plan_channels(33026, torch.ones(1), torch.zeros(1), None, 255)
    assert "33028 channels" in cuda.reason_against(weight, long, torch.device("cuda"))


@needs_cuda
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_on_cuda_are_those_of_a_cpu_bit_for_bit(bits):
    model = make_quantized(stage="finetune", bit_width=bits).pack()
    on_cuda = make_quantized(stage="finetune", bit_width=bits).pack().to("cuda")
    for layer, other in zip(model.modules(), on_cuda.modules(), strict=True):
        if isinstance(layer, PackedLayer) and layer.can_infer():
            channels = layer.channel_plan()
            codes = torch.randint(0, channels.largest + 1, (50, channels.source.numel()), dtype=torch.uint8)
            expected = layer.plan()(codes, layer.weight_quantizer.codes, channels)
            y = other.plan()(codes.cuda(), other.weight_quantizer.codes, other.channel_plan())
            assert torch.equal(y.cpu(), expected)


@needs_cuda
def test_packed_model_on_cuda_answers_as_on_a_cpu_with_its_weights_packed(backbone):
    model = make_quantized(backbone, stage="finetune", attention_bits=8).pack()
    pixel_values = make_batches(1)[0]
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).logits
        model.to("cuda")
        logits = model(pixel_values=pixel_values.cuda()).logits
        with using(None):
            plain = model(pixel_values=pixel_values.cuda()).logits
    # Triton and plain torch agree on a device bit for bit; LayerNorm, GELU and softmax differ by device in a last digit.
    assert torch.equal(logits, plain)
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-2, atol=1e-2)
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    assert layers
    for layer in layers:
        assert layer.weight_quantizer.codes.is_cuda
        assert layer.weight_quantizer.codes.dtype == torch.uint8
        assert layer.weight.is_meta
        assert cuda.reason_against(layer.weight_quantizer.plan(), layer.channel_plan(), torch.device("cuda")) is None
