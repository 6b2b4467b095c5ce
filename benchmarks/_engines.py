"""The engines of `inference.py`: what each needs on disk, and how it runs there. Each runs in a process of its own."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from quantformer_hf import QuantformerForImageClassification


#: `(batch, 3, height, width)` float32 to logits.
Run = Callable[[np.ndarray], np.ndarray]

#: Needs nothing but this package.
TORCH = ("torch fp32 eager", "torch fp32 compiled", "ours W4A4", "ours W3A3", "ours W2A2")
ONNXRUNTIME = (
    "ONNX Runtime fp32",
    "ONNX Runtime int8 QDQ",
    "ONNX Runtime int8 dynamic",
    "ONNX Runtime our W4A4 file",
    "ONNX Runtime our W4A4 file, exact",
)
#: On processors with AMX, OpenVINO computes an fp32 file in bfloat16 if it is not told otherwise.
#: Exact files are exact in float32 alone.
HELD_TO_F32 = ("OpenVINO fp32, held to f32", "OpenVINO our W4A4 file, exact")
OPENVINO = ("OpenVINO fp32", "OpenVINO int8", "OpenVINO our W4A4 file", *HELD_TO_F32)

#: The ONNX file that an engine runs, by the last word of its name.
FILES = {
    "fp32": "fp32",
    "f32": "fp32",
    "QDQ": "qdq",
    "int8": "qdq",
    "dynamic": "dynamic",
    "file": "ours",
    "exact": "exact",
}


def available_engines() -> list[str]:
    """Names of the engines whose packages are installed."""
    has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    has_openvino = has_onnx and importlib.util.find_spec("openvino")
    return [*TORCH, *(ONNXRUNTIME if has_onnx else ()), *(OPENVINO if has_openvino else ())]


def prepare(model: nn.Module, folder: Path, batch: int, engines: list[str]) -> None:
    """Write what `engines` load: a full-precision model, packed ones, and ONNX files of one batch size."""
    folder.mkdir(parents=True, exist_ok=True)
    size = model.config.image_size
    images = torch.randn(batch, 3, size, size)
    if not (folder / "full.pt").exists():
        torch.save(model, folder / "full.pt")
    for engine in engines:
        if engine.startswith("ours") and not _packed(folder, engine).exists():
            quantized = QuantformerForImageClassification.from_full_precision(model, bit_width=_bits(engine))
            quantized.calibrate([images[:2]]).begin_search(8).freeze_groups().pack().save_pretrained(
                _packed(folder, engine)
            )
    if any(engine in (*ONNXRUNTIME, *OPENVINO) for engine in engines):
        _prepare_onnx(model, folder, images)


def _prepare_onnx(model: nn.Module, folder: Path, images: torch.Tensor) -> None:
    from onnxruntime import quantization

    from quantformer_hf.exporters.onnx import export_onnx

    ours, exact = _onnx(folder, images, "ours"), _onnx(folder, images, "exact")
    if not exact.exists():
        packed = QuantformerForImageClassification.from_full_precision(model, bit_width=4)
        packed.calibrate([images[:2]]).begin_search(8).freeze_groups().pack()
        ours.unlink(missing_ok=True)
        export_onnx(packed, ours)
        export_onnx(packed, exact, exact=True)
    full, prepared = _onnx(folder, images, "fp32"), _onnx(folder, images, "prepared")
    if full.exists():
        return
    # Swin's masks can be exported only by the attention that is written out.
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    torch.onnx.export(_Logits(model).eval(), (images,), full, dynamo=True, external_data=False, verbose=False)
    model.set_attn_implementation(implementation)
    quantization.quant_pre_process(str(full), str(prepared))
    quantization.quantize_dynamic(
        prepared, _onnx(folder, images, "dynamic"), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
    )

    class Images(quantization.CalibrationDataReader):
        left = 2

        def get_next(self):
            self.left -= 1
            return {"pixel_values": np.random.randn(*images.shape).astype(np.float32)} if self.left >= 0 else None

    quantization.quantize_static(
        prepared, _onnx(folder, images, "qdq"), Images(), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
    )


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


def import_engine(engine: str) -> None:
    """Import what `load` will need: memory is measured from there."""
    if engine in ONNXRUNTIME:
        importlib.import_module("onnxruntime")
    elif engine in OPENVINO:
        importlib.import_module("openvino")
    else:
        from_transformers = importlib.import_module("transformers")
        for name in ("ViTForImageClassification", "SwinForImageClassification"):
            getattr(from_transformers, name)


def load(engine: str, folder: Path, images: np.ndarray, threads: int) -> Run:
    """The model as `engine` runs it, on `threads` threads."""
    if engine in TORCH:
        return _load_torch(engine, folder, threads)
    kind = FILES[engine.split()[-1]]
    path = str(_onnx(folder, images, kind))
    if engine in OPENVINO:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if engine in HELD_TO_F32:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda images: compiled(images)[0]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"pixel_values": images})[0]


def _load_torch(engine: str, folder: Path, threads: int) -> Run:
    torch.set_num_threads(threads)
    if engine.startswith("ours"):
        model = QuantformerForImageClassification.from_pretrained(_packed(folder, engine)).eval()
    else:
        # Our own file.
        model = torch.load(folder / "full.pt", weights_only=False).eval()
    if engine.endswith("compiled"):
        model = torch.compile(model)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(pixel_values=torch.from_numpy(images)).logits.numpy()

    return run


def _bits(engine: str) -> int:
    return int(engine[-1])


def _packed(folder: Path, engine: str) -> Path:
    return folder / f"w{_bits(engine)}"


def _onnx(folder: Path, images, kind: str) -> Path:
    return folder / f"{kind}_{len(images)}.onnx"
