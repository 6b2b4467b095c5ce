"""What is counted about a model."""

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized

from quantformer_hf.attention import ATTENTION_IMPLEMENTATION
from quantformer_hf.report import bit_operations, distinct_levels


IMAGE = make_batches(1, batch_size=1)[0]

#: ViT of conftest: two blocks, 17 tokens of 32 channels, two heads; 16 patches of 4x4x3.
LINEARS = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64)
ATTENTION = 2 * 2 * 17 * 17 * 32
EMBEDDING = 16 * 32 * 48
CLASSIFIER = 32 * 5


def test_bit_operations_by_hand():
    model = make_quantized("vit", "finetune", weight_bits=2, activation_bits=4, attention_bits=8)
    expected = LINEARS * 2 * 4 + (ATTENTION + EMBEDDING + CLASSIFIER) * 8 * 8
    assert bit_operations(model, IMAGE) == expected
    teacher = make_full_precision("vit")
    teacher.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    assert bit_operations(teacher, IMAGE) == (LINEARS + ATTENTION + EMBEDDING + CLASSIFIER) * 32 * 32


def test_operands_in_floating_point_count_as_32_bits():
    model = make_quantized("vit", attention_bits=None)
    eight = make_quantized("vit", attention_bits=8)
    assert bit_operations(model, IMAGE) - bit_operations(eight, IMAGE) == ATTENTION * (32 * 32 - 8 * 8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_counted_and_never_more_than_the_bits_allow(bits, backbone):
    model = make_quantized(backbone, "finetune", bit_width=bits)
    with torch.no_grad():
        weight_levels, activation_levels = distinct_levels(model, make_batches(1, batch_size=16)[0])
    assert 2 < weight_levels <= 2**bits
    assert activation_levels == 2**bits
