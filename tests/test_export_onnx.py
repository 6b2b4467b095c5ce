"""The exported ONNX file computes what the packed model computes, and stays small."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import BACKBONES, IMAGE_SIZE, make_batches, make_quantized
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification
from quantformer_hf.__main__ import main
from quantformer_hf.packed_layers import PackedWeight
from quantformer_hf.quantize import group_quantizers
from quantformer_hf.report import weights_on_disk


onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install '.[test]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[test]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install '.[test]'")

from quantformer_hf.exporters import exact  # noqa: E402  needs what is looked for above
from quantformer_hf.exporters.onnx import export_onnx, shorten  # noqa: E402  likewise


#: Each costs a trace of some seconds: every backbone at four bits, and every kind of code on the smallest.
CASES = {name: {"backbone": name} for name in BACKBONES} | {
    "8 bits": {"bit_width": 8},
    "3 bits": {"bit_width": 3},
    "2 bits, half-shifted": {"bit_width": 2, "weight_quantizer": "statsq"},
    "1 bit": {"weight_bits": 1, "activation_bits": 2},
    "nothing but weights": {"activation_bits": 32, "attention_bits": None, "classifier_bits": 32},
}
OPSETS = {"2 bits, half-shifted": 25}


@torch.no_grad()
def logits_of(model):
    return torch.cat([model(batch).logits for batch in make_batches()]).numpy()


def run_openvino(path, images=None):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[test]'")
    # Where the processor has bfloat16, it would compute in that.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([torch.cat(make_batches()).numpy() if images is None else images])[0]


def run(path, batch_size, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    batches = torch.cat(make_batches()).split(batch_size)
    return [session.run(["logits"], {"pixel_values": batch.numpy()})[0] for batch in batches]


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A packed model, and its file."""
    model = make_quantized(stage="finetune", **CASES[request.param]).pack()
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    export_onnx(model, path, OPSETS.get(request.param, 21))
    return model, path


def assert_close(found, expected):
    # Sums in another order: an activation that this moved to another level would move the logits by far more.
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnxruntime_gives_the_logits_of_the_packed_model_in_batches_of_any_size(exported):
    model, path = exported
    expected = logits_of(model)
    for batch_size in (1, 3, 8):
        results = run(path, batch_size)
        assert len(results[0]) == batch_size
        assert_close(torch.cat([torch.from_numpy(result) for result in results]).numpy(), expected)


@pytest.mark.slow
def test_openvino_gives_the_logits_of_the_packed_model(exported):
    model, path = exported
    if onnx.load(path).opset_import[0].version > 21:
        pytest.skip("OpenVINO does not read INT2")
    found, expected = torch.as_tensor(run_openvino(path)), torch.as_tensor(logits_of(model))
    # Its sums run in another order. With two bits one of eight images was seen to have an activation on a border, which
    # that moved to another level.
    near = torch.isclose(found, expected, rtol=1e-4, atol=1e-5).all(1)
    assert near.sum() >= len(near) - 1


@pytest.mark.slow
def test_the_file_has_standard_operators_and_codes_in_their_narrowest_type(exported):
    model, path = exported
    onnx.checker.check_model(path, full_check=True)
    content = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in content.opset_import] in ([("", 21)], [("", 25)])
    if model.config.backbone_config.model_type != "swin":
        # As transformers would make a mask that hides nothing.
        assert "Range" not in {node.op_type for node in content.graph.node}
    codes = {node.input[0] for node in content.graph.node if node.op_type == "DequantizeLinear"}
    bits = {onnx.TensorProto.INT2: 2, onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
    stored = Counter(bits[tensor.data_type] for tensor in content.graph.initializer if tensor.name in codes)
    widths = (2, 4, 8) if content.opset_import[0].version == 25 else (4, 8)
    weights = [module.grid.bits for module in model.modules() if isinstance(module, PackedWeight)]
    assert stored == Counter(next(width for width in widths if width >= bits) for bits in weights)


# The arithmetic of the packed model itself

EXACT_CASES = {
    "vit, 3 bits": {"backbone": "vit", "bit_width": 3},
    "vit, 8 bits, sums in parts": {"backbone": "vit", "bit_width": 8},
    "deit-distilled, 2 bits, half-shifted": {
        "backbone": "deit-distilled",
        "bit_width": 2,
        "weight_quantizer": "statsq",
    },
    "deit, class token": {"backbone": "deit", "bit_width": 3, "class_token_bits": 8},
    "swin": {"backbone": "swin", "weight_bits": 1, "activation_bits": 5},
}


def assert_exact(model, path):
    """The file's logits are the packed model's in both engines, whatever they merge, and however large batches are."""
    expected = logits_of(model)
    for batch_size in (1, 3, 8):
        assert np.array_equal(np.concatenate(run(path, batch_size)), expected)
    unoptimized = run(path, 8, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert np.array_equal(np.concatenate(unoptimized), expected)
    assert np.array_equal(run_openvino(path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT_CASES)
def test_an_exact_file_gives_the_logits_of_the_packed_model_bit_for_bit(case, tmp_path, monkeypatch):
    if "parts" in case:
        # The small model's sums are below what floats hold.
        monkeypatch.setattr(exact, "EXACT_FLOAT32", 2**17)
    model = make_quantized(stage="finetune", **EXACT_CASES[case])
    model.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "model.onnx"
    main(["export", "onnx", str(tmp_path / "checkpoint"), "--output", str(path), "--exact"])
    onnx.checker.check_model(path, full_check=True)
    assert_exact(model.pack(), path)
    stored = Counter(tensor.data_type for tensor in onnx.load(path).graph.initializer)
    narrow = [m.grid.bits <= 4 for m in model.modules() if isinstance(m, PackedWeight)]
    types = onnx.TensorProto.UINT4, onnx.TensorProto.UINT8
    assert tuple(stored[type_] for type_ in types) == (sum(narrow), len(narrow) - sum(narrow))


class Norm(torch.nn.Module):
    """Of many channels: all outputs are looked at, and no codes hide a last digit."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.randn(192)), torch.nn.Parameter(torch.randn(192))

    def forward(self, x):
        return torch.ops.quantformer.layer_norm(x, self.weight, self.bias, 1e-6)

    def inputs(self):
        return torch.randn(8, 50, 192)


class Borders(torch.nn.Module):
    """Codes of what another constant was added to, of inputs that lie within some last digits of where codes change."""

    LARGEST, KNEE = 255, None
    BORDERS = torch.arange(0.5, 255)

    def __init__(self):
        super().__init__()
        self.register_buffer("added", torch.randn(192))
        self.register_buffer("offset", torch.randn(192))
        self.register_buffer("inverse", torch.rand(192) + 0.5)

    def forward(self, x):
        parameters = self.offset, self.inverse, None, self.LARGEST
        return torch.ops.quantformer.quantize(x + self.added, *parameters, knee=self.KNEE).float()

    def inputs(self):
        borders = self.BORDERS.view(-1, 1, 1) / self.inverse + self.offset - self.added
        return borders * (1 + torch.arange(-3, 4).view(1, -1, 1) * 2.0**-23)


class TwinBorders(Borders):
    """Of levels of two step sizes, and where these meet."""

    LARGEST, KNEE = 35, 5
    BORDERS = torch.cat([torch.arange(0.5, 5), torch.tensor([5.0]), torch.arange(6.5, 35, 3)])


@pytest.mark.parametrize("part", [Norm, Borders, TwinBorders])
def test_an_engine_keeps_each_rounding_of_an_exact_operator(part, tmp_path):
    torch.manual_seed(0)
    module = part().eval()
    x, path = module.inputs(), tmp_path / "part.onnx"
    with torch.no_grad():
        expected = module(x).numpy()
        program = torch.onnx.export(
            module,
            (x,),
            dynamic_shapes=({0: "batch"},),
            opset_version=21,
            verbose=False,
            custom_translation_table=exact.TRANSLATIONS,
            optimize=False,
        )
    shorten(program.model)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], expected)
    assert np.array_equal(run_openvino(path, x.numpy()), expected)


def make_odd_model(**arguments):
    """One block, one class, an odd number of channels, a group without channels, and more tokens than ONNX Runtime adds up
    at once."""
    sizes = {"hidden_size": 36, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 50}
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(image_size=IMAGE_SIZE, patch_size=1, num_labels=1, **sizes, **arguments)
    ).eval()
    model = QuantformerForImageClassification.from_full_precision(vit, bit_width=3).calibrate(make_batches(1))
    model.begin_search(5).freeze_groups()
    for quantizer in group_quantizers(model):
        quantizer.group_index[quantizer.group_index == 1] = 3
    return model.eval()


@pytest.mark.slow
def test_an_exact_file_leaves_an_engine_nothing_to_merge(tmp_path):
    model = make_odd_model().pack()
    path = tmp_path / "model.onnx"
    export_onnx(model, path, opset=25, exact=True)
    assert_exact(model, path)
    # Scales that become part of a product are multiplied into each part of a long sum.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    assert not {"Gemm", "MatMulNBits", "LayerNormalization", "Gelu"} & {node.op_type for node in nodes}
    # A transposition may be merged.
    factors = {a.f for node in nodes if node.op_type == "FusedMatMul" for a in node.attribute if a.name == "alpha"}
    assert factors <= {1.0}


@pytest.mark.slow
def test_an_exact_file_has_the_tensors_of_now_and_outlives_an_image_that_is_none(tmp_path):
    model = make_quantized(stage="finetune").pack()
    logits_of(model)
    with torch.no_grad():
        model.backbone.classifier.bias.add_(1)
    export_onnx(model, tmp_path / "model.onnx", exact=True)
    assert_exact(model, tmp_path / "model.onnx")
    images = torch.cat(make_batches())[:3].clone()
    images[1, 0, 0, 0] = torch.nan
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": images.numpy()})
    assert np.array_equal(found[[0, 2]], logits_of(model)[[0, 2]])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"activation_bits": 32}, "vit.layers.0.attention.q_proj"),
        ({"attention_bits": None}, "vit.layers.0.attention"),
        ({"classifier_bits": 32}, "classifier"),
    ],
)
def test_an_exact_file_of_floating_point_is_refused(arguments, name, tmp_path):
    model = make_quantized(stage="finetune", **arguments)
    with pytest.raises(ValueError, match=f"'{name}'.*floating point.*export without it"):
        export_onnx(model, tmp_path / "model.onnx", exact=True)
    assert not list(tmp_path.iterdir())


def test_an_exact_file_of_another_activation_function_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'vit.layers.0.mlp.activation_fn'.*GELU or ReLU"):
        export_onnx(make_odd_model(hidden_act="silu"), tmp_path / "model.onnx", exact=True)


# One export each


def test_a_disk_that_is_full_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def fill(program, path):
        path.write_text("part")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fill)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(make_quantized(stage="finetune"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def make_packed_config(**arguments):
    return QuantformerConfig(stage="packed", packing_layout=1, calibrated=True, **arguments)


@pytest.mark.slow
def test_the_file_is_near_the_packed_checkpoint(tmp_path):
    backbone = ViTConfig(hidden_size=384, num_hidden_layers=2, intermediate_size=1536, num_labels=10)
    model = QuantformerForImageClassification(make_packed_config(backbone_config=backbone))
    model.save_pretrained(tmp_path)
    export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 1.1 * weights_on_disk(tmp_path)


@pytest.mark.slow
def test_the_command_exports_a_finetuned_checkpoint_with_names_and_preprocessing(tmp_path, capsys):
    model = make_quantized(stage="finetune")
    model.image_processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    model.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "model.onnx"
    main(["export", "onnx", str(tmp_path / "checkpoint"), "--output", str(path)])
    assert str(path) in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", "model.onnx"]
    assert_close(run(path, 8)[0], logits_of(model))
    metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert ViTImageProcessor(**json.loads(metadata["preprocessor_config"])).size == model.image_processor.size
    assert json.loads(metadata["id2label"]) == {str(index): name for index, name in model.config.id2label.items()}
    assert str(tmp_path).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


# Bad input


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    make_quantized(stage="finetune").pack().save_pretrained(folder)
    return folder


def refusal(*arguments):
    with pytest.raises(SystemExit) as refused:
        main(["export", "onnx", *map(str, arguments)])
    return refused.value.code


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    message = refusal(tmp_path / "nowhere", "--output", tmp_path / "model.onnx")
    assert f"{tmp_path / 'nowhere'} does not exist: name the folder of a checkpoint" in message


@pytest.mark.parametrize("stage", ["pretrain", "search"])
def test_groups_that_are_not_frozen_are_refused(stage, tmp_path):
    make_quantized(stage=stage).save_pretrained(tmp_path / "checkpoint")
    message = refusal(tmp_path / "checkpoint", "--output", tmp_path / "model.onnx")
    assert f"the model is in the stage '{stage}', whose groups can still change: run the stage 'finetune'" in message
    assert not (tmp_path / "model.onnx").exists()


def test_a_file_that_is_there_is_not_overwritten(packed, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("somebody's")
    assert f"{path} exists: name another file, or take it away first" in refusal(packed, "--output", path)
    assert path.read_text() == "somebody's"


def test_another_operator_set_is_refused(packed, tmp_path):
    message = refusal(packed, "--output", tmp_path / "model.onnx", "--opset", 17)
    assert "opset is 17: choose one of 21, 25" in message


def test_a_damaged_checkpoint_is_refused(packed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert "is damaged" in refusal(copy, "--output", tmp_path / "model.onnx")


def test_packages_that_are_not_installed_are_named(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(packed, "--output", tmp_path / "model.onnx")
    assert "needs onnx and onnxscript, not installed here: run pip install 'quantformer_hf[onnx]'" in message
