"""Budgets as people write them: `2.5MB`, `30ms`, `20GBitOps`, `W3A3`."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


#: Units of costs: weight files, products of one image, time of one image.
BYTES, BIT_OPERATIONS, MILLISECONDS = "bytes", "BitOps", "ms"

_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

#: A unit, and what one of it is, by what may stand behind the number.
_SUFFIXES = {
    **{f"{prefix}B": (BYTES, factor) for prefix, factor in _FACTORS.items()},
    **{f"{prefix}iB": (BYTES, 1024.0**power) for power, prefix in enumerate("KMG", start=1)},
    **{f"{prefix}BitOps": (BIT_OPERATIONS, factor) for prefix, factor in _FACTORS.items()},
    "ms": (MILLISECONDS, 1.0),
    "s": (MILLISECONDS, 1e3),
}

_BY_LOWER_CASE = {suffix.lower(): meaning for suffix, meaning in _SUFFIXES.items()}


@dataclass(frozen=True)
class Budget:
    """What a model may cost at most.

    Attributes:
        unit: `bytes`, `BitOps` or `ms`.
        most: in that unit.
    """

    unit: str
    most: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2.5MB` (decimal), `2.4MiB`, `30ms` or `20GBitOps`; capitals do not matter.

        Raises:
            ValueError: no positive number, or no unit.
        """
        match = re.fullmatch(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:e\d+)?)\s*([a-z]+)\s*", text.lower())
        if match is None or match[2] not in _BY_LOWER_CASE or not float(match[1]) > 0:
            raise ValueError(
                f"budget is {text!r}: write a size, a time or an effort, such as 2.5MB, 30ms or 20GBitOps, or the bits whose"
                f" cost it is, such as W3A3 (BitOps), W3A3bytes or W3A3ms"
            )
        unit, factor = _BY_LOWER_CASE[match[2]]
        return cls(unit, float(match[1]) * factor)

    def __str__(self) -> str:
        return format_cost(self.unit, self.most)


@dataclass(frozen=True)
class UniformBudget:
    """What a model may cost at most: as much as with the same bits in every layer (`cost.budget_in_numbers`).

    Attributes:
        unit: as in `Budget`.
        weight_bits, activation_bits: 1 to 8, and 2 to 8.
    """

    unit: str
    weight_bits: int
    activation_bits: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read `W3A3` or `W3A3BitOps`, `W3A3bytes` or `W3A3ms`; None where `text` is something else.

        Raises:
            ValueError: bits that no layer has, or another unit.
        """
        match = re.fullmatch(r"\s*w(\d+)a(\d+)\s*([a-z]*)\s*", text.lower())
        if match is None:
            return None
        weight_bits, activation_bits = int(match[1]), int(match[2])
        if not (1 <= weight_bits <= 8 and 2 <= activation_bits <= 8):
            raise ValueError(f"budget is {text!r}: weights have 1 to 8 bits, and activations 2 to 8")
        units = {unit.lower(): unit for unit in (BYTES, BIT_OPERATIONS, MILLISECONDS)} | {"": BIT_OPERATIONS}
        if match[3] not in units:
            raise ValueError(f"budget is {text!r}: behind bits stands nothing, BitOps, bytes or ms")
        return cls(units[match[3]], weight_bits, activation_bits)


def parse_budgets(texts: Iterable[str]) -> list[Budget | UniformBudget]:
    """All of `texts`, which are to hold together.

    Raises:
        ValueError: as `Budget.parse` and `UniformBudget.parse`, or two budgets of one unit.
    """
    budgets = [UniformBudget.parse(text) or Budget.parse(text) for text in texts]
    units = [budget.unit for budget in budgets]
    for unit in units:
        if units.count(unit) > 1:
            raise ValueError(f"budget names {unit} more than once: keep the smaller")
    return budgets


def format_cost(unit: str, value: float) -> str:
    """A cost in words: bytes exactly, as a budget has to be; the others to four digits or so."""
    if unit == BYTES:
        return f"{value:,.0f} bytes ({value / 1e6:.3f} MB)"
    return f"{value:.3f} ms" if unit == MILLISECONDS else f"{value / 1e9:.4f} GBitOps"


def format_least(unit: str, value: float) -> str:
    """A cost as `Budget.parse` reads it, rounded up, so that as a budget it is enough; and in words."""
    if unit == MILLISECONDS:
        return f"{math.ceil(value * 1e3) / 1e3}ms"
    return f"{math.ceil(value)}{'B' if unit == BYTES else unit} ({format_cost(unit, value)})"
