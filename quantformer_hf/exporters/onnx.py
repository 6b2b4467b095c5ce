"""A packed model as one ONNX file of standard operators, its weights in the narrowest integer type that ONNX has."""

import copy
import json
import os
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from ..configuration_quantformer import QuantformerConfig
from ..modeling_quantformer import QuantformerForImageClassification
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
    model: QuantformerForImageClassification, path: str | os.PathLike, opset: int = DEQUANTIZE_VERSION
) -> None:
    """Write `model` to `path`: `pixel_values` `(batch, channels, height, width)` to `logits` `(batch, classes)`, float32.

    Batches have any size, images that of the model. The metadata of the file holds, as JSON, `id2label` and, where the
    checkpoint came with it, the image processor's `preprocessor_config`.

    Args:
        model: in the stage `finetune` or `packed`; it stays as it is.
        path: of the file, which must not be there yet. Folders are made.
        opset: 21, which ONNX Runtime and OpenVINO read: weights of 1 to 4 bits take four in the file, those of 5 to 8
            eight. 25 stores weights of 1 and 2 bits in two; OpenVINO (2026.4) does not read it.

    Raises:
        ValueError: groups that are not frozen, or another operator set.
        FileExistsError: the file is there.
        ImportError: `onnx` or `onnxscript` is not installed.
    """
    path = Path(path)
    check_export(model.config, path, opset)
    traceable = copy.deepcopy(model).cpu().float().eval()
    if traceable.config.stage == "finetune":
        traceable.pack()
    make_traceable(traceable.backbone)
    program = _trace(traceable, opset)
    narrow_weights(program.model, traceable, opset)
    program.model.metadata_props.update(_metadata(model))

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    try:
        program.save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_export(config: QuantformerConfig, path: Path, opset: int) -> None:
    """Raise what `export_onnx` raises for a model of `config`, before anything is loaded."""
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}: choose one of {', '.join(map(str, OPSETS))}")
    if config.stage not in ("finetune", "packed"):
        raise ValueError(
            f"the model is in the stage '{config.stage}', whose groups can still change: run the stage 'finetune', or"
            f" model.freeze_groups(), and export what that gives"
        )
    if path.exists():
        raise FileExistsError(f"{path} exists: name another file, or take it away first")


@torch.no_grad()
def _trace(model: QuantformerForImageClassification, opset: int) -> torch.onnx.ONNXProgram:
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
    )
    # Where each node was traced, which is longer than the packed weights of a small model, and names this machine's paths.
    ClearMetadataAndDocStringPass()(program.model)
    graph = program.model.graph
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()
    return program


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
