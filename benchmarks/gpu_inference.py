"""Packed models on a CUDA device beside bfloat16, eager and compiled: milliseconds a batch, and memory of the weights.

    python benchmarks/gpu_inference.py [--bits 2 4 8] [--batch_sizes 1 32 256] [--rounds 21]

DeiT-Small at 224 px, random weights and images, eight groups; candidates run in turn, medians of CUDA events.
The packed model is also run in plain torch: what its Triton kernels gain over that.
"""

import argparse
import contextlib
import copy
import statistics
import sys
from collections.abc import Callable

import torch
from _machine import describe_machine
from transformers import ViTConfig, ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.kernels import using
from quantformer_hf.packed_layers import PackedLayer
from quantformer_hf.report import format_table


#: DeiT-Small without its distillation token.
DEIT_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


def event_medians(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each candidate between two CUDA events; all run in turn, after two calls to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
        candidate()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            candidate()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def weight_bytes(model: torch.nn.Module) -> int:
    """Of parameters and buffers, as they lie in memory, and of weights that are there once more for the kernels."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    laid_out = [layer.plan(layer.channel_plan()).laid_out for layer in layers if layer.can_infer()]
    once_more = [arguments[0] for arguments in laid_out if arguments is not None]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *once_more))


def packed_model(full_precision: ViTForImageClassification, bits: int) -> QuantformerForImageClassification:
    """A packed model with activations and attention operands of `bits`, calibrated on random images."""
    model = QuantformerForImageClassification.from_full_precision(
        copy.deepcopy(full_precision), bit_width=bits, attention_bits=bits
    )
    model.calibrate([torch.randn(8, 3, 224, 224)])
    return model.begin_search(8).freeze_groups().pack().to("cuda")


def inference(model: Callable, images: torch.Tensor, *, plain: bool = False) -> Callable[[], None]:
    """A call of `model`, with `plain` in plain torch."""

    def run() -> None:
        with using(None) if plain else contextlib.nullcontext(), torch.inference_mode():
            model(pixel_values=images)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures one; benchmarks/inference.py measures CPUs")

    torch.manual_seed(0)
    full_precision = ViTForImageClassification(ViTConfig(**DEIT_SMALL, num_labels=1000)).eval()
    packed = {bits: packed_model(full_precision, bits) for bits in arguments.bits}
    bfloat16 = full_precision.to("cuda", torch.bfloat16)
    compiled = torch.compile(bfloat16)

    rows = []
    for batch_size in arguments.batch_sizes:
        images = torch.randn(batch_size, 3, 224, 224, device="cuda")
        halved = images.to(torch.bfloat16)

        models = {"bfloat16": bfloat16, "bfloat16, compiled": bfloat16}
        candidates = {"bfloat16": inference(bfloat16, halved), "bfloat16, compiled": inference(compiled, halved)}
        for bits, model in packed.items():
            name = f"packed W{bits}A{bits}"
            candidates |= {name: inference(model, images), f"{name}, plain torch": inference(model, images, plain=True)}
            models |= {name: model, f"{name}, plain torch": model}
        medians = event_medians(candidates, arguments.rounds)
        rows += [
            [
                str(batch_size),
                name,
                f"{median:.2f} ms",
                f"{medians['bfloat16'] / median:.2f}",
                f"{weight_bytes(models[name]) / 1e6:.1f} MB",
            ]
            for name, median in medians.items()
        ]
    print(f"{describe_machine()}\nDeiT-Small, {arguments.rounds} interleaved rounds, medians\n")
    print(format_table(["batch", "model", "time", "times bfloat16's speed", "weights"], rows))


if __name__ == "__main__":
    main()
