"""The compiled kernels: found beside the package, loaded once, called through ctypes.

`pip install` builds them from `csrc/` where a C++ compiler is at hand. They know nothing of torch, so that one build
serves every version; torch lends them its threads through its stable C interface.
"""

import contextlib
import ctypes
import importlib.util
import logging
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint8, c_void_p
from pathlib import Path

import torch


#: The extension module's name, whose file this is; it is never imported.
NAME = "quantformer_hf.kernels._native"

logger = logging.getLogger(__name__)

_kernels: ctypes.CDLL | None = None
_looked = False
_off = False


class LayerNorm(Structure):
    """`LayerNorm` of `codes.h`."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_float)]


class Norm(Structure):
    """`Norm` of `kernels.h`."""

    _fields_ = [("x", c_void_p), ("rows", c_int64), ("channels", c_int64), ("norm", LayerNorm), ("y", c_void_p)]


class Codes(Structure):
    """`Codes` of `codes.h`."""


Codes._fields_ = [
    ("x", c_void_p),
    ("rows", c_int64),
    ("channels", c_int64),
    ("offset", c_void_p),
    ("inverse", c_void_p),
    ("largest", c_int32),
    ("knee", c_int32),
    ("gelu", c_int32),
    ("source", c_void_p),
    ("positions", c_int64),
    ("codes", c_void_p),
    ("norm", POINTER(LayerNorm)),
    ("first", POINTER(Codes)),
    ("first_rows", c_int64),
    ("image_rows", c_int64),
    ("stride", c_int64),
]


class Product(Structure):
    """`Product` of `product.h`."""


Product._fields_ = [
    ("x", c_void_p),
    ("rows", c_int64),
    ("x_stride", c_int64),
    ("largest_x", c_int32),
    ("codes", c_void_p),
    ("code_stride", c_int64),
    ("outputs", c_int64),
    ("columns", c_int64),
    ("bits", c_int32),
    ("largest_code", c_int32),
    ("multiplier", c_int32),
    ("addend", c_int32),
    ("source", c_void_p),
    ("positions", c_int64),
    ("group_ends", POINTER(c_int64)),
    ("group_scales", c_void_p),
    ("groups", c_int64),
    ("multiples", POINTER(c_uint8)),
    ("units", POINTER(c_float)),
    ("scale", c_void_p),
    ("bias", c_void_p),
    ("y", c_void_p),
    ("y_stride", c_int64),
    ("by_column", c_int32),
    ("ordered", c_void_p),
    ("ordered_bits", c_int32),
    ("output_order", c_void_p),
    ("first", POINTER(Product)),
    ("first_rows", c_int64),
    ("image_rows", c_int64),
]


class AttentionProbabilities(Structure):
    """`Probabilities` of `kernels.h`."""

    _fields_ = [
        ("query", c_void_p),
        ("key", c_void_p),
        ("query_codes", c_void_p),
        ("key_codes", c_void_p),
        ("batch", c_int64),
        ("heads", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("head_size", c_int64),
        ("query_strides", c_int64 * 3),
        ("key_strides", c_int64 * 3),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 3),
        ("operands", c_void_p),
        ("largest", c_int32),
        ("scaling", c_float),
        ("probabilities", c_void_p),
        ("hidden", c_void_p),
        ("windows", c_int64),
    ]


class AttentionMix(Structure):
    """`Mixed` of `kernels.h`."""

    _fields_ = [
        ("probabilities", c_void_p),
        ("value", c_void_p),
        ("value_codes", c_void_p),
        ("batch", c_int64),
        ("heads", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("head_size", c_int64),
        ("value_strides", c_int64 * 3),
        ("operand", c_void_p),
        ("largest", c_int32),
        ("output", c_void_p),
    ]


class Mlp(Structure):
    """`Mlp` of `kernels.h`."""

    _fields_ = [("first", Product), ("between", Codes), ("second", Product)]


class AttentionBlock(Structure):
    """`AttentionBlock` of `kernels.h`."""

    _fields_ = [
        ("query", Product),
        ("key", Product),
        ("value", Product),
        ("scores", AttentionProbabilities),
        ("mix", AttentionMix),
        ("between", Codes),
        ("output", Product),
    ]


class Block(Structure):
    """`Block` of `kernels.h`."""

    _fields_ = [
        ("x", c_void_p),
        ("norm_before", LayerNorm),
        ("norm_after", LayerNorm),
        ("order", c_void_p),
        ("image_tokens", c_int64),
        ("image_rows", c_int64),
        ("before", Codes),
        ("attention", AttentionBlock),
        ("after", Codes),
        ("mlp", Mlp),
    ]


class Blocks(Structure):
    """`Blocks` of `kernels.h`."""

    _fields_ = [
        ("blocks", POINTER(POINTER(Block))),
        ("count", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


class Runs(Structure):
    """`Runs` of `kernels.h`."""

    _fields_ = [
        ("starts", c_void_p),
        ("rows", c_int64),
        ("count", c_int64),
        ("length", c_int64),
        ("image_size", c_int64),
    ]


class Linear(Structure):
    """`Linear` of `kernels.h`."""

    _fields_ = [("runs", Runs), ("norm", POINTER(LayerNorm)), ("codes", Codes), ("product", Product)]


class Tokens(Structure):
    """`Tokens` of `kernels.h`."""

    _fields_ = [
        ("lead", c_void_p * 2),
        ("positions", c_void_p),
        ("batch", c_int64),
        ("leading", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
    ]


class Mean(Structure):
    """`Mean` of `kernels.h`."""

    _fields_ = [("batch", c_int64), ("rows", c_int64), ("channels", c_int64)]


#: Number of each kind of step, by its job: `StepKind` of `kernels.h`.
STEP_KINDS = {Linear: 0, Tokens: 1, Blocks: 2, Norm: 3, Mean: 4}


class Step(Structure):
    """`Step` of `kernels.h`."""

    _fields_ = [("kind", c_int32), ("job", c_void_p), ("size", c_int64)]


class Model(Structure):
    """`Model` of `kernels.h`."""

    _fields_ = [
        ("steps", POINTER(Step)),
        ("count", c_int64),
        ("numbers", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


#: `kMeaning` of `kernels.h`.
MEANING = 1

#: What the kernels say of images of which a number is not finite: `kNotFinite` of `kernels.h`.
NOT_FINITE = 1


def library() -> ctypes.CDLL | None:
    """The kernels, or None, with one warning, where they were not built."""
    global _kernels, _looked
    if not _looked:
        _looked = True
        _kernels = _load()
    return None if _off else _kernels


def switched_off() -> bool:
    """Whether plain torch was asked for, by `using(None)`."""
    return _off


def _command_to_build() -> str:
    # Who runs in a checkout imports what lies there, whatever is installed beside it.
    root = Path(__file__).parents[2]
    if (root / "setup.py").exists():
        return f"pip install -e {root}"
    return "pip install --force-reinstall --no-deps quantformer_hf"


def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec(NAME)
    if found is None or found.origin is None:
        logger.warning(
            "the kernels of quantformer_hf were not built, and packed models run in plain torch: same results, slower."
            f" With a C++ compiler, {_command_to_build()} builds them"
        )
        return None
    jobs = {
        "quantformer_quantize": Codes,
        "quantformer_layer_norm": Norm,
        "quantformer_multiply": Product,
        "quantformer_probabilities": AttentionProbabilities,
        "quantformer_mix": AttentionMix,
        "quantformer_mlp": Mlp,
        "quantformer_attention_block": AttentionBlock,
        "quantformer_blocks": Blocks,
        "quantformer_model": Model,
    }
    try:
        kernels = ctypes.CDLL(found.origin)
        kernels.quantformer_job_bytes.restype = c_int64
        sizes = (ctypes.sizeof(job) for job in (*jobs.values(), Block, Linear, Tokens, Mean, Step))
        fits = kernels.quantformer_job_bytes() == MEANING + sum(sizes)
        kernels.quantformer_plan_order.argtypes = [POINTER(Product), POINTER(Codes)]
        kernels.quantformer_plan_order.restype = c_int64
    except (OSError, AttributeError):
        fits = False
    if not fits:
        logger.warning(
            "the kernels of quantformer_hf (%s) are of another version or damaged, and packed models run in plain torch:"
            " same results, slower. %s builds them anew",
            found.origin,
            _command_to_build(),
        )
        return None
    for name, job in jobs.items():
        getattr(kernels, name).argtypes = [POINTER(job), c_int64, c_void_p]
        getattr(kernels, name).restype = c_int32
    kernels.quantformer_order_weights.argtypes = [POINTER(Product), POINTER(Codes), c_void_p]
    kernels.quantformer_order_weights.restype = c_int32
    kernels.quantformer_instruction_set.restype = c_char_p
    kernels.quantformer_use_instruction_set.argtypes = [c_char_p]
    kernels.parallel_for = _parallel_for()
    return kernels


def _parallel_for() -> c_void_p | None:
    """Address of torch's `torch_parallel_for`; None, for one thread, where it cannot be found."""
    path = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    if path is None:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, c_void_p)
    except (OSError, AttributeError):
        # Torch before 2.10, or one that is linked in some other way.
        logger.warning("this torch lends no threads: packed models run on one")
        return None


def check(status: int) -> None:
    """Raise MemoryError for what a kernel returns when it could not work."""
    if status:
        raise MemoryError("a kernel ran out of memory")


def instruction_set() -> str | None:
    """What instructions are in use (`amx`, `avx512`, `avx2`, `neon_dotprod`, `neon`, `plain`), or None without kernels."""
    kernels = library()
    return None if kernels is None else kernels.quantformer_instruction_set().decode()


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """Run with these instructions inside the `with` block, or in plain torch for None: to compare them.

    Raises:
        ValueError: this machine does not have them, or the kernels were not built.
    """
    global _off
    before, were_off = instruction_set(), _off
    _off = name is None
    if name is not None and (_kernels is None or _kernels.quantformer_use_instruction_set(name.encode())):
        _off = were_off
        raise ValueError(f"the instruction set {name!r} cannot run here: {before or 'no kernel'} can")
    try:
        yield
    finally:
        _off = were_off
        if before is not None:
            _kernels.quantformer_use_instruction_set(before.encode())
