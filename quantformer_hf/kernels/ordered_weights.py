"""Weights of few bits once more, in the order in which the kernels read them."""

import ctypes

import torch
from torch import Tensor

from .library import Codes, Product, check, library


#: Outputs whose weights the kernels unpack together: `kPanel` of `instruction_set.h`.
PANEL = 16

#: Bits of a weight up to which jobs have it in the order of the panels too.
ORDERED_BITS = 4


def order_weights(prepared: Product, then: Codes | None = None) -> tuple[Product, Tensor | None]:
    """A copy of the job with its weights once more, in the order in which the kernels unpack them with the least work.

    Weights of more than 4 bits are left alone: of them, a second copy would take more than the time it saves is worth. One
    of 3 bits takes 4 there.

    Args:
        then: the codes that the outputs become; by default they are read as they are.

    Returns:
        The job, and what it points into beside what `prepared` does.
    """
    job = Product.from_buffer_copy(prepared)
    if job.bits > ORDERED_BITS:
        return job, None
    bits, places = 2 if job.bits <= 2 else ORDERED_BITS, job.outputs if then is None else then.positions
    ordered = torch.empty(-(-places // PANEL), job.positions * PANEL * bits // 8, dtype=torch.uint8)
    reader = None if then is None else ctypes.byref(then)
    check(library().quantformer_order_weights(ctypes.byref(job), reader, bits, ordered.data_ptr()))
    job.ordered, job.ordered_bits = ordered.data_ptr(), bits
    job.output_order = None if then is None else then.source
    return job, ordered
