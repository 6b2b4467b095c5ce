"""Weights once more, in the order in which the kernels take them.

Files have them row by row, in the order of the layers' inputs and as many bits as they need. Kernels want some rows
together, inputs in groups and outputs as what comes next reads them: to put them so at each call costs up to a tenth of a
model's time.
"""

import ctypes

import torch
from torch import Tensor

from .library import Codes, Product, check, library


def order_weights(
    prepared: Product, then: Codes | None = None, shared: tuple[Product, Tensor | None] | None = None
) -> tuple[Product, Tensor | None]:
    """A copy of the job with its weights once more, in the order in which the instructions in use take them with the least
    work: 2 or 4 bits each, of those of up to 4.

    Args:
        then: the codes that the outputs become; by default they are read as they are.
        shared: what this gave for a job of the same weights, whose copy serves if it lies alike.

    Returns:
        The job, and what it points into beside what `prepared` does.
    """
    job, reader = Product.from_buffer_copy(prepared), None if then is None else ctypes.byref(then)
    size = library().quantformer_plan_order(ctypes.byref(job), reader)
    if size == 0:
        return job, None
    if shared is not None and job.ordered_bits == shared[0].ordered_bits:
        job.ordered = shared[0].ordered
        return job, shared[1]
    ordered = torch.empty(size, dtype=torch.uint8, device="cpu")
    check(library().quantformer_order_weights(ctypes.byref(job), reader, ordered.data_ptr()))
    job.ordered = ordered.data_ptr()
    return job, ordered
