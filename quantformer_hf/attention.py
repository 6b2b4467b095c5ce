"""The attention function: quantized operands of both products, and probabilities that a loss can read.

transformers calls the function registered here in every block of ViT, DeiT and Swin, so that no model code is copied.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from .grids import Grid
from .kernels import Remembered, in_integers, infers, operators
from .ops import positive, quantize_rows, quantized_attention
from .quantizers import ActivationQuantizer


#: The name by which `attn_implementation` chooses the function of this module.
ATTENTION_IMPLEMENTATION = "quantformer"


class RowQuantizer(nn.Module):
    """Of rows that are not negative, each in units of its largest value (`ops.quantize_rows`); it has nothing to learn.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.grid = Grid(bits, signed=False)

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., keys)` in and out."""
        return quantize_rows(rows, self.grid.qmax)


class AttentionOperands(nn.Module):
    """Quantizers of the four operands of an attention block's two products: q, k and v have one scale and offset each, and
    the probabilities of each query levels in units of the largest of them.

    Args:
        bits: of each operand, 2 to 8.
        name: the attention block, for messages.
        calibrated: as of `ActivationQuantizer`.
        width: channels of v, of all heads together.
    """

    def __init__(self, bits: int, name: str, calibrated: bool, width: int):
        super().__init__()
        self._operands: Remembered[tuple[Tensor, Tensor]] = Remembered()
        self.query = ActivationQuantizer(bits, f"{name}.query", calibrated)
        self.key = ActivationQuantizer(bits, f"{name}.key", calibrated)
        # Calibration may yet shift the channels of v (folding.py).
        self.value = ActivationQuantizer(bits, f"{name}.value", calibrated, observed_channels=width)
        self.probabilities = RowQuantizer(bits)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results as `quantized_attention`; in floating point while calibrating."""
        quantizers = self.calibrated_ones()
        if all(quantizer.enabled for quantizer in quantizers):
            for quantizer in quantizers:
                quantizer.check_calibrated()
            if infers(self) or (self.query.packed and in_integers()):
                return self.infer(query, key, value, mask, scaling)
            return quantized_attention(
                query,
                key,
                value,
                mask,
                tuple(quantizer.scale for quantizer in quantizers),
                tuple(quantizer.offset for quantizer in quantizers),
                self.query.grid.qmax,
                scaling,
                dropout,
            )
        output, probabilities = plain_attention(query, key, value, mask, scaling, dropout)
        by_channel = value.transpose(1, 2).flatten(2)
        for quantizer, operand in zip(quantizers, (query, key, by_channel), strict=True):
            if quantizer.observer is not None:
                quantizer.observer.add(operand)
        return output, probabilities

    def calibrated_ones(self) -> tuple[ActivationQuantizer, ...]:
        """The quantizers that have a scale and an offset."""
        return self.query, self.key, self.value

    def infer(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, both products in integers."""
        of_scores, of_value = self.operands()
        largest = self.query.grid.qmax
        mask = None if mask is None else mask.float()
        probabilities = operators.call(
            operators.attention_probabilities, query.float(), key.float(), mask, of_scores, largest, scaling
        )
        output = operators.call(operators.attention_mix, probabilities, value.float(), of_value, largest)
        return output.to(query.dtype).transpose(1, 2), probabilities.to(query.dtype)

    def operands(self) -> tuple[Tensor, Tensor]:
        """What both products need of the quantizers (`kernels.operators`)."""
        if not self.query.packed:
            return self._make_operands()
        return self._operands.get(tuple(self.children()), self._make_operands)

    def forget_plans(self) -> None:
        """After the tensors may have changed unseen."""
        self._operands.forget()

    def _make_operands(self) -> tuple[Tensor, Tensor]:
        """Scale, its inverse and offset of query and key, `(2, 3)`, and of value, `(3,)`."""
        rows = []
        for quantizer in self.calibrated_ones():
            scale = positive(quantizer.scale).detach().float()
            rows.append(torch.cat([scale, 1 / scale, quantizer.offset.detach().float()]))
        return torch.stack(rows[:2]), rows[2]


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """`softmax(q kᵀ * scaling + mask) v` and the probabilities, shapes as in `quantized_attention`."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(probabilities, dropout) if dropout > 0 else probabilities
    return torch.matmul(weights, value), probabilities


def quantformer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`softmax(q kᵀ * scaling + mask) v`.

    Operands are quantized where `module.operands` is an `AttentionOperands`. The probabilities before their
    quantization are appended to `module.captured_attention` where `capture_attention` has put a list there.

    Args:
        module: attention block.
        query, key, value: `(batch, heads, tokens, head_dim)`; Swin's batch counts windows.
        attention_mask: added to the scores, broadcast to `(batch, heads, tokens, tokens)`: Swin's relative position bias
            and shift mask.

    Returns:
        output `(batch, tokens, heads, head_dim)`, and the probabilities `(batch, heads, tokens, tokens)` if anybody
        wants them, else None.
    """
    operands: AttentionOperands | None = getattr(module, "operands", None)
    captured: list[Tensor] | None = getattr(module, "captured_attention", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    wanted = captured is not None or attention_is_told(module, kwargs)
    if operands is not None:
        output, probabilities = operands(query, key, value, attention_mask, scaling, dropout)
    elif wanted:
        output, probabilities = plain_attention(query, key, value, attention_mask, scaling, dropout)
    else:
        probabilities = None
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    if captured is not None:
        captured.append(probabilities)
    return output.transpose(1, 2).contiguous(), probabilities if wanted else None


def attention_is_told(module: nn.Module, kwargs: dict) -> bool:
    """Whether the probabilities are told, as the caller says, and otherwise the config: as transformers has it."""
    return bool(kwargs.get("output_attentions", module.config.output_attentions))


def quantformer_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """As `eager_mask`, but None where no token is hidden: an exported graph would add zeros to the scores of each block."""
    skip = attention_mask is None and kwargs.get("allow_is_bidirectional_skip", False)
    return None if skip else eager_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_IMPLEMENTATION, quantformer_attention)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, quantformer_mask)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention blocks of a ViT, DeiT or Swin (quantized or not), in the order in which they run."""
    return [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "o_proj")]


@contextlib.contextmanager
def capture_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention probabilities of each block that runs inside the `with` block, in order.

    Leave the block before `backward()`: activation checkpointing runs the blocks a second time there.

    Args:
        model: a model that runs `quantformer_attention`.

    Yields:
        a list that fills with `(batch, heads, tokens, tokens)`, one a block.

    Raises:
        RuntimeError: on leaving, if the number of maps is not the number of attention blocks.
    """
    maps: list[Tensor] = []
    modules = attention_modules(model)
    for module in modules:
        module.captured_attention = maps
    try:
        yield maps
    finally:
        for module in modules:
            del module.captured_attention
    if len(maps) != len(modules):
        raise RuntimeError(
            f"{len(maps)} attention maps were captured from {len(modules)} attention blocks: run one forward pass, of a"
            f" model whose attn_implementation is '{ATTENTION_IMPLEMENTATION}'"
        )
