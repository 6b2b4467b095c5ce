"""The packed model on CUDA: Triton kernels by the interpreter, by what they compile to, and on a GPU where there is one."""

import importlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batches, make_quantized

from quantformer_hf.kernels import cuda, operators, plans, reference, using
from quantformer_hf.kernels.laid_out import lay_out
from quantformer_hf.packed_layers import PackedLayer
from quantformer_hf.packing import pack_codes


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
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_product_uses_integer_tensor_cores_and_fuses_no_rounding(capability, bits):
    # Compiling needs no GPU.
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = cuda.triton_kernels().multiply_kernel
    # Merged groups, and with eight bits activations above 127.
    constants = {
        "BITS": bits,
        "MERGED": bits < 8,
        "SHIFTED": bits == 8,
        "SPLIT": False,
        "BLOCK_ROWS": 16,
        "BLOCK_OUTPUTS": 64,
        "BLOCK_POSITIONS": 32,
    }
    pointers = {"x": "*u8", "packed": "*u8", "multiples": "*u8", "spans": "*i32"}
    types = (
        pointers | dict.fromkeys(("run_scales", "scale", "bias", "y"), "*fp32") | dict.fromkeys(constants, "constexpr")
    )
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    # As triton finds of plans on a GPU.
    known = types.keys() - constants | {"positions", "width"}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name in known]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    ptx = compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert re.search(r"mma\S*\.s32\.s8\.s8", ptx)
    # Neighbours are read together.
    assert "cp.async" in ptx
    assert not re.search(r"ld\.global\S*8 ", ptx)
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
    plan = plans.plan_linear(weight, packed, None, channels)
    laid_out = plans.plan_part(weight, packed, None, channels, lay_out(weight, packed, channels.source))
    for _ in range(2):
        assert torch.equal(cuda.multiply(codes, *laid_out.arguments), reference.multiply(codes, *plan.arguments))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "triton cannot be imported" in cuda.reason_against(weight, channels, torch.device("cuda"))


def test_sums_that_may_not_fit_into_32_bits_stay_in_plain_torch(monkeypatch):
    monkeypatch.setattr(cuda, "reason_against_device", lambda device: None)
    _, _, weight, channels = make_layer()
    assert cuda.reason_against(weight, channels, torch.device("cuda")) is None
    # 255 * 255 * 33026 > 2^31.
    long = plans.plan_channels(33026, torch.ones(1), torch.zeros(1), None, 255)
    assert "33028 channels" in cuda.reason_against(weight, long, torch.device("cuda"))


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((8, 0), None, None), ((7, 5), None, "compute capability (7, 5)"), ((9, 0), "6.0", "NVIDIA's tensor cores only")],
)
def test_old_and_foreign_devices_run_plain_torch(capability, hip, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "triton_kernels", lambda: cuda)
        found = cuda.reason_against_device(torch.device("cuda"))
    assert found is None if reason is None else reason in found


def test_doubles_become_codes_in_plain_torch(monkeypatch):
    monkeypatch.setattr(cuda, "reason_against_device", lambda device: None)
    monkeypatch.setattr(cuda, "triton_kernels", lambda: pytest.fail("the kernel takes no doubles"))
    operands = torch.randn(4, 8, dtype=torch.float64), torch.randn(8), torch.rand(8), None, 15
    assert torch.equal(cuda.quantize(*operands), reference.quantize(*operands))


@pytest.mark.parametrize("unit", [1.0, 0.3])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_a_layer_that_is_laid_out_for_a_gpu_gives_the_same_bits(bits, unit):
    torch.manual_seed(bits)
    # Of one weight, as for a class token; 0.3 times a multiple is rounded, so that groups stay apart.
    scales = unit * torch.tensor([[1.0, 3.0, 7.0], [2.0, 1.0, 1.0]])
    index = torch.randint(0, 3, (37,))
    weight = plans.plan_weight(37, bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0, torch.rand(5))
    packed, bias = pack_codes(torch.randint(0, 2**bits, (5, 37)), bits), torch.randn(5)
    aligned = [plans.plan_channels(37, scale, torch.randn(3), index, 15, alignment=16) for scale in scales]
    rows = lay_out(weight, packed, aligned[0].source)
    x = torch.randn(6, 37)
    for channels in aligned:
        assert channels.source.numel() % 16 == 0
        plain = plans.plan_channels(37, channels.group_scales, channels.group_offsets, index, 15)
        expected = plans.plan_linear(weight, packed, bias, plain)
        other = plans.plan_part(weight, packed, bias, channels, rows)
        assert torch.equal(other.bias, expected.bias)
        y = operators.multiply(channels.quantize(x), *other.arguments)
        assert torch.equal(y, operators.multiply(plain.quantize(x), *expected.arguments))
        # A copy makes its plan anew: weights need not be in it twice.
        assert len(pickle.dumps(other)) < len(pickle.dumps(expected)) + 500
        # -128 times 1 is a byte, but 128 is none.
        assert (other.arguments[-1] is not None) == (unit == 1 and bits < 8)


@needs_cuda
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_on_cuda_are_those_of_a_cpu_bit_for_bit(bits):
    model = make_quantized(stage="finetune", bit_width=bits).pack()
    on_cuda = make_quantized(stage="finetune", bit_width=bits).pack().to("cuda")
    for layer, other in zip(model.modules(), on_cuda.modules(), strict=True):
        if isinstance(layer, PackedLayer) and layer.can_infer():
            channels, on_device = layer.channel_plan(), other.channel_plan()
            x = torch.randn(50, channels.channels)
            expected = layer.plan(channels)(channels.quantize(x))
            y = other.plan(on_device)(on_device.quantize(x.cuda()))
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
