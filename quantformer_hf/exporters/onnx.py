"""A packed model as one ONNX file of standard operators, its weights in the narrowest integer type that ONNX has."""

import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
)
from torch import Tensor, nn

from ..attention import attention_modules
from ..configuration_quantformer import QuantformerConfig
from ..modeling_quantformer import QuantformerForImageClassification
from ..pack import prepare_inference
from ..packed_layers import PackedLayer
from ..packing import unpack_codes
from ..quantize import connect_readers
from .exact import TRANSLATIONS
from .traceable import DEQUANTIZE_VERSION, TraceableWeight, make_traceable


#: Integer types of a weight, narrowest first: bits, name, and the operator set and version of the file format it needs.
WEIGHT_TYPES = ((2, "INT2", 25, 13), (4, "INT4", DEQUANTIZE_VERSION, 10), (8, "INT8", DEQUANTIZE_VERSION, 10))

#: Operator sets that can be asked for; with the first, ONNX Runtime and OpenVINO both read the file.
OPSETS = tuple(sorted({opset for _, _, opset, _ in WEIGHT_TYPES}))


class _Logits(nn.Module):
    def __init__(self, model: QuantformerForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_onnx(
    model: QuantformerForImageClassification,
    path: str | os.PathLike,
    opset: int = DEQUANTIZE_VERSION,
    exact: bool = False,
) -> list[Path]:
    """Write `model` to `path`: `pixel_values` `(batch, channels, height, width)` to `logits` `(batch, classes)`, float32.

    Batches have any size, images that of the model. The metadata of the file holds, as JSON, `id2label` and, where the
    checkpoint came with it, the image processor's `preprocessor_config`.

    Args:
        model: in the stage `finetune` or `packed`; it stays as it is.
        path: of the file, which must not be there yet. Folders are made.
        opset: 21, which ONNX Runtime and OpenVINO read: weights of 1 to 4 bits take four in the file, those of 5 to 8
            eight. 25 stores weights of 1 and 2 bits in two; OpenVINO (2026.4) does not read it.
        exact: write the arithmetic of the packed model operator by operator (`exporters/exact.py`): ONNX Runtime,
            and OpenVINO in float32, then give its logits of finite images bit for bit, and take longer. Weights take 4 or 8
            bits, whatever the operator set.

    Returns:
        the files: beyond 1.5 GB another one, `path` with `.data` after it, holds the weights.

    Raises:
        ValueError: groups that are not frozen, another operator set, or `exact` of a model that computes in floating point.
        FileExistsError: the file is there.
        ImportError: `onnx` or `onnxscript` is not installed.
    """
    path = Path(path)
    check_export(model.config, path, opset)
    traceable = copy.deepcopy(model).cpu().float().eval()
    if traceable.config.stage == "finetune":
        traceable.pack()
    if exact:
        _check_integers(traceable.backbone)
        # What layers remember is of before the copy, or of before their tensors were changed.
        connect_readers(traceable.backbone, packed=True)
        prepare_inference(traceable.backbone)
        program = _trace(traceable, opset, TRANSLATIONS)
        lay_out_codes(program)
        shorten(program.model)
    else:
        make_traceable(traceable.backbone)
        program = _trace(traceable, opset)
        narrow_weights(program.model, traceable, opset)
    program.model.metadata_props.update(_metadata(model))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as drafts:
        program.save(Path(drafts) / path.name)
        # The file itself, which names the one with the data, comes last.
        written = sorted(Path(drafts).iterdir(), key=lambda draft: draft.name == path.name)
        for draft in written:
            _check_free(path.with_name(draft.name))
        return [draft.replace(path.with_name(draft.name)) for draft in written]


def check_export(config: QuantformerConfig, path: Path, opset: int) -> None:
    """Raise what `export_onnx` raises for a model of `config`, before anything is loaded."""
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}: choose one of {', '.join(map(str, OPSETS))}")
    if config.stage not in ("finetune", "packed"):
        raise ValueError(
            f"the model is in the stage '{config.stage}', whose groups can still change: run the stage 'finetune', or"
            f" model.freeze_groups(), and export what that gives"
        )
    _check_free(path)


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists: name another file, or take it away first")


@torch.no_grad()
def _trace(
    model: QuantformerForImageClassification, opset: int, translations: dict[Callable, Callable] | None = None
) -> torch.onnx.ONNXProgram:
    config = model.config.backbone_config
    size = config.image_size
    # A batch of one would be taken for a constant.
    images = torch.zeros(2, config.num_channels, *((size, size) if isinstance(size, int) else size))
    program = torch.onnx.export(
        _Logits(model).eval(),
        (images,),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        opset_version=opset,
        dynamo=True,
        verbose=False,
        custom_translation_table=translations,
        # It takes minutes where thousands of nodes stand for an operator each, and engines do it again.
        optimize=translations is None,
    )
    # Where each node was traced, which is longer than the packed weights of a small model, and names this machine's paths.
    ClearMetadataAndDocStringPass()(program.model)
    graph = program.model.graph
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()
    return program


def _check_integers(backbone: nn.Module) -> None:
    """Raise ValueError where a layer or an attention block of a packed model computes in floating point."""
    plain = [
        name
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not (isinstance(layer, PackedLayer) and layer.can_infer())
    ]
    blocks = attention_modules(backbone)
    for name, module in backbone.named_modules():
        function = getattr(module, "activation_fn", None)
        if module in blocks and not hasattr(module, "operands"):
            plain.append(name)
        # GELU is where codes are made, and Identity here.
        elif function is not None and not isinstance(function, nn.Identity | nn.ReLU):
            plain.append(f"{name}.activation_fn")
    if plain:
        raise ValueError(
            f"exact: '{plain[0]}' ({len(plain)} in all) computes in floating point, whose sums differ from engine to"
            f" engine in their last digit: export without it, or a model whose weights, activations, attention products,"
            f" patch embedding and classifier all have 8 bits or fewer, with GELU or ReLU"
        )


def shorten(model: ir.Model) -> None:
    """Leave out, in place, what thousands of nodes need not say: equal constants, names, types and shapes in between."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    for number, node in enumerate(model.graph):
        node.name = None
        for place, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name, value.shape = f"{number}.{place}", None
                # Codes, which are bytes in torch, are floats here.
                value.type = None


def lay_out_codes(program: torch.onnx.ONNXProgram) -> None:
    """Store the codes of each weight, which were traced packed, as `exact.multiply` takes them, in the narrowest type that
    engines convert. At positions without a channel is any code, for the input's is zero."""
    traced = program.exported_program
    names = traced.graph_signature.inputs_to_buffers | traced.graph_signature.inputs_to_lifted_tensor_constants
    tensors = traced.state_dict | traced.constants
    nodes = traced.graph.find_nodes(op="call_function", target=torch.ops.quantformer.multiply.default)
    # The class token's product has the same weight as that of the other tokens.
    for weight, columns, bits, source in {
        node.args[1].name: (*node.args[1:4], node.args[7]) for node in nodes
    }.values():
        packed, order = tensors[names[weight.name]], tensors[names[source.name]]
        codes = unpack_codes(packed, bits, columns)[:, order.long().clamp(max=columns - 1)].T.contiguous().numpy()
        value = program.model.graph.initializers[names[weight.name]]
        value.dtype, value.shape = ir.DataType.UINT4 if bits <= 4 else ir.DataType.UINT8, ir.Shape(codes.shape)
        value.const_value = ir.tensor(codes, dtype=value.dtype, name=value.name)


def narrow_weights(model: ir.Model, traceable: nn.Module, opset: int) -> None:
    """Store the codes of each weight, which were traced as int8, in the narrowest of `WEIGHT_TYPES` that `opset` has.

    Args:
        model: traced from `traceable`; changed in place.
    """
    for name, weight in traceable.named_modules():
        if not isinstance(weight, TraceableWeight):
            continue
        _, type_name, _, ir_version = next(t for t in WEIGHT_TYPES if weight.bits <= t[0] and t[2] <= opset)
        value = model.graph.initializers[f"model.{name}.codes"]
        value.dtype = ir.DataType[type_name]
        value.const_value = ir.tensor(weight.codes.numpy(), dtype=value.dtype, name=value.name)
        model.ir_version = max(model.ir_version, ir_version)


def _metadata(model: QuantformerForImageClassification) -> dict[str, str]:
    metadata = {"id2label": json.dumps(model.config.id2label)}
    if model.image_processor is not None:
        metadata["preprocessor_config"] = model.image_processor.to_json_string()
    return metadata
