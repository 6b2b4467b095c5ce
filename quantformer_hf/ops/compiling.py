"""One decorator: compile a plain tensor function once, or run it as it stands where that cannot be done."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit


#: Kernels of one function in one process.
MOST_KERNELS = 64

logger = logging.getLogger(__name__)

_use_compiler = True


@contextlib.contextmanager
def eager_functions() -> Iterator[None]:
    """Run the plain functions inside the `with` block: to compare the two, or to step through one."""
    global _use_compiler
    before, _use_compiler = _use_compiler, False
    try:
        yield
    finally:
        _use_compiler = before


def _switch_to_eager(error: Exception) -> None:
    global _use_compiler
    _use_compiler = False
    reason = str(error).strip().splitlines()[0]
    logger.warning(
        f"torch.compile could not build the quantizers, which now run eagerly: same results,"
        f" slower training steps. A C++ compiler (CPU) or Triton (GPU) mends this. Reason: {reason}"
    )


def compiled(function: Callable) -> Callable:
    """Compile `function` at its first call; if no compiler is at hand, warn once and run it eagerly.

    All sizes are dynamic, so that another batch size or layer width compiles nothing anew. Inside a graph that somebody
    else compiles or exports, the plain function is traced into that graph.
    """
    compiled_function = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        if not _use_compiler or torch.compiler.is_compiling():
            return function(*args)
        # Kernels are specialised to the class, the strides and the gradient flag of what they are given: one form of
        # each argument means one kernel.
        args = [arg.detach().contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]
        try:
            return compiled_function(*args)
        except torch.OutOfMemoryError:
            raise
        except FailOnRecompileLimitHit:
            # Each dtype, and each size of one, is a kernel of its own: in one process there may be more than Dynamo's
            # usual handful. Later calls find theirs in the cache, where no limit is looked at.
            with torch._dynamo.config.patch(recompile_limit=MOST_KERNELS):
                return compiled_function(*args)
        # Dynamo and Inductor raise many kinds when the tool chain is absent. The plain function then either works,
        # or raises the error that is really the caller's.
        except (RuntimeError, OSError, ImportError) as error:
            result = function(*args)
            _switch_to_eager(error)
            return result

    return call
