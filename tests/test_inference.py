"""Inference of whole models in integers, packed and not, whatever instructions this machine has."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import instruction_sets, make_batches, make_quantized
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantformer_hf.grids import GELU_KNEES, gelu_grid
from quantformer_hf.kernels import (
    fake_quantized,
    in_integers,
    instruction_set,
    library,
    reference,
    using,
)
from quantformer_hf.layers import InferenceLayerNorm, InferenceMean
from quantformer_hf.modeling_quantformer import StageError
from quantformer_hf.packed_layers import PackedLayer


def logits(model, batch):
    with torch.no_grad():
        return model(pixel_values=batch).logits


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packing_changes_no_bit_of_the_logits(backbone, bits, name):
    model = make_quantized(backbone, "finetune", weight_bits=bits, activation_bits=max(2, bits))
    batch = make_batches()[0]
    expected = logits(model, batch)
    with using(name):
        assert torch.equal(logits(model.pack(), batch), expected)


def test_the_sign_of_a_learned_scale_does_not_count(backbone):
    model, batch = make_quantized(backbone, "finetune"), make_batches()[0]
    expected = logits(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.neg_()
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model.pack(), batch), expected)


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("packed", [False, True])
def test_every_layer_norm_has_the_bits_of_the_reference(backbone, packed, name):
    model = make_quantized(backbone, "finetune")
    model = model.pack() if packed else model
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    plain = [norm for norm in norms if type(norm) is InferenceLayerNorm]
    # Those whose output is not quantized: the last one, and Swin's before it is cut into windows.
    assert len(plain) == (5 if backbone == "swin" else 1)
    assert all(isinstance(norm, InferenceLayerNorm) for norm in norms)
    for norm in plain:
        x = torch.randn(3, 5, *norm.normalized_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), using(name):
            assert torch.equal(norm(x), reference.layer_norm(x, norm.weight, norm.bias, norm.eps))
        if not packed:
            # Training has gradients, and torch's arithmetic.
            assert torch.equal(norm(x), nn.LayerNorm.forward(norm, x))


@pytest.mark.parametrize("packed", [False, True])
def test_the_mean_of_swins_tokens_has_the_bits_of_the_reference(packed):
    model = make_quantized("swin", "finetune")
    model = model.pack() if packed else model
    (mean,) = (module for module in model.modules() if isinstance(module, InferenceMean))
    x = torch.randn(3, 16, 49, generator=torch.Generator().manual_seed(0))
    plain = nn.AdaptiveAvgPool1d(1)(x)
    torch.testing.assert_close(plain, reference.mean(x))
    with torch.no_grad():
        assert torch.equal(mean(x), reference.mean(x))
    if not packed:
        assert torch.equal(mean(x), plain)


def test_batch_size_and_threads_change_no_bit():
    model = make_quantized("swin", "finetune").pack()
    batch = make_batches(1, batch_size=5)[0]
    expected = logits(model, batch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat([logits(model, image) for image in batch.split(1)]), expected)
            assert torch.equal(logits(model, batch), expected)
    finally:
        torch.set_num_threads(threads)


def test_integers_and_floating_point_agree_where_no_activation_is_near_a_border():
    """At eight bits and in a model of two blocks a last digit moves nothing far."""
    model = make_quantized("vit", "finetune", bit_width=8)
    batch = make_batches()[0]
    expected = logits(model, batch)
    with fake_quantized():
        in_floating_point = logits(model, batch)
        assert torch.equal(logits(model.pack(), batch), in_floating_point)
    torch.testing.assert_close(in_floating_point, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_code_is_above_the_largest_and_there_are_two_to_the_bits(backbone, bits):
    model = make_quantized(backbone, "finetune", bit_width=bits, embedding_bits=bits, classifier_bits=bits).pack()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function is torch.ops.quantformer.quantize.default:
                # Its last argument is there where levels have two step sizes.
                seen.append((len(arguments) > 6 and arguments[6] is not None, result.unique()))
            return result

    with Watch():
        logits(model, make_batches(1)[0])
    assert len(seen) > 8
    assert any(twin for twin, _ in seen) == (bits in GELU_KNEES)
    for twin, codes in seen:
        assert codes.max() <= (gelu_grid(bits).qmax if twin else 2**bits - 1)
        assert codes.numel() <= 2**bits


def test_a_packed_model_compiles_and_exports_whole():
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    expected = logits(model, batch)
    torch.testing.assert_close(logits(torch.compile(model.backbone, fullgraph=True), batch), expected)
    exported = torch.export.export(model.backbone, (), {"pixel_values": batch})
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    operators_of_ours = {name for name in names if name.startswith("quantformer.")}
    assert operators_of_ours == {
        f"quantformer.{name}.default"
        for name in ("layer_norm", "quantize", "multiply", "attention_probabilities", "attention_mix")
    }
    with torch.no_grad():
        assert torch.equal(exported.module()(pixel_values=batch).logits, expected)


def graph_of(model, batch, how):
    if how == "compiled":
        return torch.compile(model, backend="eager")
    return torch.export.export(model, (), {"pixel_values": batch}, strict=how == "strict").module()


@pytest.mark.parametrize("how", ["compiled", "exported", "strict"])
def test_a_graph_has_the_tensors_that_were_loaded_last(how):
    model, other = (make_quantized("vit", "finetune").pack() for _ in range(2))
    with torch.no_grad():
        for name, parameter in other.backbone.named_parameters():
            if name.endswith(("fc1.bias", "query.scale", "projection.weight_quantizer.scale")):
                parameter.mul_(1.5)
    batch = make_batches()[0]
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(graph_of(model, batch, how)(pixel_values=batch).logits, logits(other, batch))


def test_what_was_compiled_before_follows_what_is_loaded():
    model = make_quantized("vit", "finetune").pack()
    batch, state = make_batches()[0], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled, expected = torch.compile(model, backend="eager"), logits(model, batch)
    assert torch.equal(logits(compiled, batch), expected)
    state["backbone.classifier.bias"] += 1
    model.backbone.load_state_dict({name.removeprefix("backbone."): state[name] for name in state}, strict=False)
    torch.testing.assert_close(logits(compiled, batch), expected + 1)


@pytest.mark.parametrize("how", ["data", "inference_mode"])
def test_loading_its_own_tensors_shows_a_model_what_pytorch_did_not_count(how):
    with torch.inference_mode(how == "inference_mode"):
        model = make_quantized("vit", "finetune").pack()
        batch = make_batches()[0]
        expected = logits(model, batch)
        for parameter in (model.backbone.classifier.bias, model.backbone.vit.layers[0].mlp.fc2.bias):
            parameter.data.add_(1)
        model.load_state_dict(model.state_dict())
        changed = logits(model, batch)
        assert not torch.equal(changed, expected)
        model.backbone.vit.layers[0].mlp.fc2.bias.data.sub_(1)
        model.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits(model, batch), expected + 1)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_packed_model_takes_any_number_of_images(strict):
    model = make_quantized("vit", "finetune").pack()
    batch = torch.cat(make_batches())
    sizes = {"pixel_values": {0: torch.export.Dim("images", min=1, max=64)}}
    exported = torch.export.export(
        model.backbone, (), {"pixel_values": batch[:4]}, dynamic_shapes=sizes, strict=strict
    ).module()
    for images in (batch[:4], batch[:3], batch):
        with torch.no_grad():
            assert torch.equal(exported(pixel_values=images).logits, logits(model, images))


def test_floating_point_is_for_the_thread_that_asks():
    def elsewhere(function):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    one, other = fake_quantized(), fake_quantized()
    one.__enter__()
    assert not in_integers()
    assert elsewhere(in_integers)
    elsewhere(other.__enter__)
    one.__exit__(None, None, None)
    assert in_integers()
    assert elsewhere(in_integers)


def test_a_trace_holds_the_operators():
    layer = make_quantized("vit", "finetune").pack().backbone.vit.layers[0].mlp.fc2
    example, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (example,), check_trace=False)
        assert torch.equal(traced(other), layer(other))


def test_plans_follow_tensors_that_change():
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    before = logits(model, batch)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, PackedLayer) and m.reads).weight_quantizer.scale.mul_(1.5)
    assert not torch.equal(logits(model, batch), before)


def test_inference_sees_what_a_fused_optimizer_has_moved():
    """Such a step leaves the version of a tensor as it was."""
    model = make_quantized("vit", "finetune")
    batch = make_batches()[0]
    logits(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model.train()(pixel_values=batch).logits.square().sum().backward()
    optimizer.step()
    result = logits(model.eval(), batch)
    fresh = make_quantized("vit", "finetune")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(result, logits(fresh, batch))


def test_a_model_that_is_packed_again_follows_what_was_trained_between():
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    logits(model, batch)
    model.unpack().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(pixel_values=batch).logits.square().sum().backward()
    optimizer.step()
    expected = logits(model.eval(), batch)
    assert torch.equal(logits(model.pack(), batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_moved_to_another_dtype_infer_packed_or_not(backbone, dtype):
    model = make_quantized(backbone, "finetune").to(dtype)
    batch = make_batches()[0].to(dtype)
    expected = logits(model, batch)
    assert expected.dtype == dtype
    result = logits(model.pack(), batch)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)


def test_inputs_of_other_sizes_are_refused():
    model = make_quantized("vit", "finetune")
    for fc2 in (model.backbone.vit.layers[0].mlp.fc2, model.pack().backbone.vit.layers[0].mlp.fc2):
        with torch.no_grad(), pytest.raises(ValueError, match=r"mlp\.fc2' takes 64 channels, and was given 40"):
            fc2.eval()(torch.randn(2, 40))


def test_a_packed_model_has_no_gradients_and_half_precision_keeps_its_dtype(tmp_path):
    model = make_quantized("swin", "finetune").pack()
    batch = make_batches()[0]
    assert not model(pixel_values=batch).logits.requires_grad
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(half, batch.bfloat16()).dtype == torch.bfloat16


def test_kernel_info_says_what_serves_each_layer(backbone):
    model = make_quantized(backbone, "finetune", layer_bits={"*.fc1": {"activation_bits": 32}})
    with pytest.raises(StageError, match=r"run model\.pack\(\) first"):
        model.kernel_info()
    with pytest.raises(StageError, match=r"in 'pretrain': run model\.begin_search\(\), .* and model\.pack\(\) first"):
        make_quantized(backbone).kernel_info()
    info = model.pack().kernel_info()
    assert len([name for name in info if not name.endswith("operands")]) == len(
        [m for m in model.modules() if isinstance(m, PackedLayer)]
    )
    served = f"kernel ({instruction_set()})" if instruction_set() else "integers in plain torch"
    assert all(text.startswith("floating point, W4: its input") for name, text in info.items() if name.endswith("fc1"))
    assert all(text == f"{served}, W4A4" for name, text in info.items() if name.endswith(("q_proj", "o_proj", "fc2")))
    assert all(text == f"{served}, A8" for name, text in info.items() if name.endswith("operands"))
    with using(None):
        assert "integers in plain torch, W4A4" in model.kernel_info().values()


def test_without_kernels_the_same_results_come_with_one_warning(monkeypatch, caplog):
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    expected = logits(model, batch)
    monkeypatch.setattr(library, "_looked", False)
    monkeypatch.setattr(library, "_kernels", None)
    monkeypatch.setattr(library, "NAME", "quantformer_hf.kernels._absent")
    assert torch.equal(logits(model, batch), expected)
    logits(model, batch)
    assert [record.message[:42] for record in caplog.records] == ["the kernels of quantformer_hf were not bui"]


def test_attention_of_another_kind_is_refused(backbone, stage):
    model, images = make_quantized(backbone, stage), make_batches(1)[0]
    with torch.no_grad():
        expected = model(images).logits
        for name in ("eager", "sdpa"):
            with pytest.raises(ValueError, match=f"attn_implementation is '{name}', and a quantized model has its own"):
                model.set_attn_implementation(name)
        model.set_attn_implementation("quantformer")
        assert torch.equal(model(images).logits, expected)
