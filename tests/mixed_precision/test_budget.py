"""Budgets as people write them."""

import pytest

from quantformer_hf.mixed_precision.budget import Budget, UniformBudget, format_cost, format_least, parse_budgets


@pytest.mark.parametrize(
    ("text", "unit", "most"),
    [
        ("2.5MB", "bytes", 2_500_000),
        ("2 MiB", "bytes", 2 * 2**20),
        ("800kb", "bytes", 800_000),
        ("1234B", "bytes", 1234),
        ("30ms", "ms", 30),
        ("0.5s", "ms", 500),
        ("20GBitOps", "BitOps", 20e9),
        (".5tbitops", "BitOps", 0.5e12),
        ("1.5e9BitOps", "BitOps", 1.5e9),
    ],
)
def test_a_budget_is_read(text, unit, most):
    assert Budget.parse(text) == Budget(unit, most)


@pytest.mark.parametrize("text", ["", "2.5", "MB", "-1MB", "0MB", "2.5 parsecs", "nanMB", "1,5MB"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 2\.5MB, 30ms or 20GBitOps"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "unit", "bits"),
    [
        ("W3A3", "BitOps", (3, 3)),
        ("w4a8bitops", "BitOps", (4, 8)),
        (" W1A2bytes", "bytes", (1, 2)),
        ("W8A8ms", "ms", (8, 8)),
    ],
)
def test_bits_are_read_as_the_budget_that_they_cost(text, unit, bits):
    assert parse_budgets([text]) == [UniformBudget(unit, *bits)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W3", "such as W3A3"),
        ("W3A3 W4A4", "such as W3A3"),
        ("W9A3", "'W9A3': weights have 1 to 8 bits"),
        ("W3A1", "activations 2 to 8"),
        ("W10A3bytes", "weights have 1 to 8 bits"),
        ("W3A3MB", "'W3A3MB': behind bits stands nothing, BitOps, bytes or ms"),
    ],
)
def test_bits_that_no_model_has_are_no_budget(text, message):
    with pytest.raises(ValueError, match=message):
        parse_budgets([text])


def test_two_budgets_of_one_unit_are_refused():
    with pytest.raises(ValueError, match="names bytes more than once"):
        parse_budgets(["2MB", "10ms", "1MiB"])
    with pytest.raises(ValueError, match="names BitOps more than once"):
        parse_budgets(["W3A3", "20GBitOps"])


def test_a_cost_in_words_keeps_every_byte():
    assert format_cost("bytes", 2777132) == "2,777,132 bytes (2.777 MB)"
    assert format_cost("BitOps", 22719037440) == "22.7190 GBitOps"
    assert format_cost("ms", 12.3456) == "12.346 ms"


@pytest.mark.parametrize(
    ("unit", "value"), [("bytes", 2777132), ("BitOps", 22719037441.5), ("ms", 12.3454), ("ms", 0.0001)]
)
def test_the_least_cost_in_words_is_enough_as_a_budget(unit, value):
    budget = Budget.parse(format_least(unit, value).split(" (")[0])
    assert budget.unit == unit
    assert value <= budget.most <= value + 1
