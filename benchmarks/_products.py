"""Matrix products of DeiT's shapes: our kernels beside torch in float32, and beside what the instructions allow."""

import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from quantformer_hf.kernels import (
    LinearPlan,
    instruction_set,
    plan_channels,
    plan_linear,
    plan_weight,
)
from quantformer_hf.kernels.library import Product, check, library
from quantformer_hf.multiples import to_multiples
from quantformer_hf.packing import pack_codes
from quantformer_hf.report import format_table


#: rows, inputs, outputs: DeiT-Tiny's, DeiT-Small's, and a batch of eight.
SHAPES = [
    (197, 192, 192),
    (197, 192, 768),
    (197, 768, 192),
    (197, 384, 384),
    (197, 384, 1536),
    (197, 1536, 384),
    (1576, 384, 384),
]

#: One panel of weights, for so many rows that the tile that multiplies is all that counts.
CEILING_SHAPE = (24576, 416, 16)


def print_products(rounds: int) -> None:
    """Interleaved medians on one thread; W and A have the same bits.

    Raises:
        RuntimeError: the kernels were not built.
    """
    if library() is None:
        raise RuntimeError("--products times the kernels, which were not built: python setup.py build_ext --inplace")
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        for bits in (4, 2, 8):
            for groups in (1, 8):
                ours, ceiling = product(shape, bits, groups), ceiling_of(bits)
                x, weight = torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1])
                rates = interleaved_rates(
                    {
                        "torch": (lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), shape),
                        "ours": (ours, shape),
                        "ceiling": (ceiling, CEILING_SHAPE),
                    },
                    5 * rounds,
                )
                rows.append(
                    [
                        f"{'x'.join(map(str, shape))} W{bits}A{bits}, {groups} group{'s' if groups > 1 else ''}",
                        f"{rates['torch']:.0f}",
                        f"{rates['ours']:.0f}",
                        f"{rates['ours'] / rates['torch']:.2f}",
                        f"{rates['ceiling']:.0f}",
                        f"{100 * rates['ours'] / rates['ceiling']:.0f} %",
                    ]
                )
    print(f"instruction set {instruction_set()}; GMAC/s on one thread")
    columns = ["", "torch fp32", "ours", "ratio", "ceiling", "of the ceiling"]
    if instruction_set() == "amx":
        # Rows are brought into the order of tiles, in memory of their own: so many leave the caches.
        columns = columns[:4]
    else:
        print(
            "The ceiling is the same tile, one group, on one row of codes and one panel of weights, which never leave L1.\n"
        )
    print(format_table(columns, [row[: len(columns)] for row in rows]))


def linear(inputs: int, outputs: int, bits: int, groups: int) -> LinearPlan:
    """One of random codes, with scales of groups as models have them."""
    index = torch.randperm(inputs) % groups
    scales = to_multiples(torch.rand(groups) + 0.1)
    channels = plan_channels(inputs, scales, torch.randn(groups), index, 2**bits - 1)
    packed = pack_codes(torch.randint(0, 2**bits, (outputs, inputs)), bits)
    weight = plan_weight(inputs, bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0, torch.rand(outputs))
    return plan_linear(weight, packed, None, channels)


def product(shape: tuple[int, int, int], bits: int, groups: int) -> Callable[[], object]:
    """A call of the kernel that multiplies random codes of `shape`, as a transformer block makes it."""
    rows, inputs, outputs = shape
    plan = linear(inputs, outputs, bits, groups)
    codes: Tensor = plan.channels.quantize(torch.randn(rows, inputs))
    job, kept = plan.ordered_job()
    return _call(job, codes, rows, torch.empty(rows, outputs), plan, kept)


def ceiling_of(bits: int) -> Callable[[], object]:
    """A call that multiplies one row again and again, and puts what comes out always in the same place."""
    rows, inputs, outputs = CEILING_SHAPE
    plan = linear(inputs, outputs, bits, 1)
    job = Product.from_buffer_copy(plan.job)
    job.x_stride = job.y_stride = 0
    return _call(job, plan.channels.quantize(torch.randn(inputs)), rows, torch.empty(outputs), plan)


def _call(job: Product, codes: Tensor, rows: int, y: Tensor, *kept: object) -> Callable[[], object]:
    job, kernels = Product.from_buffer_copy(job), library()
    job.x, job.rows, job.y = codes.data_ptr(), rows, y.data_ptr()
    # The tensors stay as long as what points into them.
    return lambda: (check(kernels.quantformer_multiply(ctypes.byref(job), 1, None)), codes, y, kept)


def interleaved_rates(candidates: dict, rounds: int) -> dict[str, float]:
    """Billions of multiplications a second, from the median time of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, (call, _) in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {
        name: shape[0] * shape[1] * shape[2] / statistics.median(times[name][1:]) / 1e9
        for name, (_, shape) in candidates.items()
    }
