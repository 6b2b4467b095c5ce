"""Losses at values computed by hand."""

import math

import pytest
import torch

from quantformer_hf.losses import (
    assignment_entropy,
    attention_rank_consistency,
    entropy_matching_degree,
    evenly_spaced_rows,
    feature_distillation,
    logit_distillation,
    mean_row_entropy,
)


def test_attention_loss_is_zero_for_the_sharpened_map_of_the_teacher():
    teacher = torch.rand(2, 3, 4, 4).softmax(-1)
    squared = teacher**2
    loss = attention_rank_consistency([squared], [teacher], torch.tensor([2.0]), batch_size=2)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_attention_loss_by_hand():
    # One image, one head, two tokens: student (1, 0, 0, 1), teacher (1, 1, 1, 1) / 2, cosine 2 / (√2 √4).
    student = torch.eye(2)[None, None]
    teacher = torch.full((1, 1, 2, 2), 0.5)
    expected = 2 - 2 / math.sqrt(2)
    loss = attention_rank_consistency([student], [teacher], torch.tensor([1.0]), batch_size=1)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    # A second layer that agrees halves the mean.
    loss = attention_rank_consistency([student, teacher], [teacher, teacher], torch.tensor([1.0, 1.0]), batch_size=1)
    assert loss.item() == pytest.approx(expected / 2, abs=1e-6)


@pytest.mark.parametrize("degree", [1.0, 5.0, 16.0])
@pytest.mark.parametrize("tokens", [16, 577])
def test_attention_loss_of_flat_maps_does_not_underflow(tokens, degree):
    student, teacher = (torch.randn(2, 3, tokens, tokens).softmax(-1) for _ in range(2))
    own, taught = student.double().flatten(1), teacher.double().flatten(1).pow(degree)
    expected = (2 - 2 * (own * taught).sum(1) / (own.norm(dim=1) * taught.norm(dim=1))).mean()
    found = attention_rank_consistency([student], [teacher], torch.tensor([degree]), 2)
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)


def test_attention_loss_lies_between_zero_and_two():
    disjoint = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    disjoint[0][..., 0], disjoint[1][..., 1] = 1, 1
    loss = attention_rank_consistency([disjoint[0]], [disjoint[1]], torch.ones(1), batch_size=1)
    assert loss.item() == pytest.approx(2.0)


def test_attention_loss_flattens_all_windows_of_an_image_together():
    student, teacher = torch.rand(6, 2, 4, 4), torch.rand(6, 2, 4, 4)
    together = attention_rank_consistency([student], [teacher], torch.ones(1), batch_size=2)
    flat = [maps.reshape(2, 1, 1, -1) for maps in (student, teacher)]
    torch.testing.assert_close(together, attention_rank_consistency([flat[0]], [flat[1]], torch.ones(1), batch_size=2))


def test_attention_loss_gives_no_gradient_to_the_teacher():
    student = torch.rand(1, 1, 2, 2, requires_grad=True)
    teacher = torch.rand(1, 1, 2, 2, requires_grad=True)
    attention_rank_consistency([student], [teacher], torch.ones(1), 1).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [logit_distillation, lambda *states: feature_distillation(*([one] for one in states))])
def test_what_is_distilled_gives_no_gradient_to_the_teacher(loss):
    student, teacher = (torch.rand(2, 5, requires_grad=True) for _ in range(2))
    loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_other_numbers_of_blocks_are_refused():
    with pytest.raises(ValueError, match="1 attention blocks and the teacher 2"):
        attention_rank_consistency([torch.rand(1, 1, 2, 2)], [torch.rand(1, 1, 2, 2)] * 2, torch.ones(1), 1)


def test_assignment_entropy_by_hand():
    uniform, certain = torch.full((4, 3), 0.25), torch.tensor([[1.0] * 3] + [[0.0] * 3] * 3)
    assert assignment_entropy([uniform]).item() == pytest.approx(math.log(4))
    assert assignment_entropy([certain]).item() == pytest.approx(0, abs=1e-6)
    # The mean is over channels: two uniform ones and one certain.
    mixed = assignment_entropy([uniform[:, :2], certain[:, :1]])
    assert mixed.item() == pytest.approx(2 / 3 * math.log(4), rel=1e-5)


def test_assignment_entropy_has_a_finite_gradient_where_probabilities_underflow():
    logits = torch.tensor([[0.0, 500.0], [0.0, 0.0]], requires_grad=True)
    assignment_entropy([logits.softmax(0)]).backward()
    assert logits.grad.isfinite().all()


def test_logit_distillation_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    student = torch.zeros(1, 2)
    # KL((3/4, 1/4) ‖ (1/2, 1/2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logit_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # At temperature 2 the teacher's logits halve, and the loss is multiplied by four.
    p = math.sqrt(3) / (1 + math.sqrt(3))
    at_two = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert logit_distillation(student, teacher, temperature=2.0).item() == pytest.approx(at_two, rel=1e-5)
    assert logit_distillation(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_row_entropy_by_hand():
    assert mean_row_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert mean_row_entropy(torch.tensor([[0.75, 0.25]]), 2.0).item() == pytest.approx(
        -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), rel=1e-5
    )


@pytest.mark.parametrize("wanted", [1.0, 1.7, 4.3])
def test_adaptive_degree_matches_the_target_entropy(wanted):
    teacher = torch.randn(500, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    target = mean_row_entropy(teacher, wanted)
    degree = entropy_matching_degree(teacher, target)
    assert abs(mean_row_entropy(teacher, degree) - target).item() < 1e-3
    assert degree.item() == pytest.approx(wanted, abs=1e-3)


def test_adaptive_degree_stays_within_its_range():
    teacher = torch.randn(100, 20).softmax(-1)
    assert entropy_matching_degree(teacher, torch.tensor(100.0)).item() == 1.0
    assert entropy_matching_degree(teacher, torch.tensor(0.0), largest=6.0).item() == pytest.approx(6.0, abs=1e-3)


def test_the_rows_looked_at_do_not_depend_on_how_images_are_spread():
    windows = torch.rand(4 * 3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    together = evenly_spaced_rows(windows, images=4, rows_per_image=7)
    apart = torch.cat([evenly_spaced_rows(part, images=2, rows_per_image=7) for part in windows.split(6)])
    # Every fifth of 36, so that all places in a window are seen.
    assert together.shape == (4 * 7, 6)
    assert torch.equal(together, apart)


def test_no_more_rows_than_there_are():
    assert evenly_spaced_rows(torch.rand(2, 1, 3, 3), images=2, rows_per_image=100).shape == (6, 3)


def test_feature_loss_sees_direction_and_not_size():
    teacher = [torch.randn(2, 3, 8), torch.randn(2, 3, 8)]
    assert feature_distillation([2 * t + 1 for t in teacher], teacher).item() == pytest.approx(0, abs=1e-4)
    assert feature_distillation([-t for t in teacher], teacher).item() == pytest.approx(4, rel=1e-3)
    # One of two states is opposite, the other equal.
    assert feature_distillation([teacher[0], -teacher[1]], teacher).item() == pytest.approx(2, rel=1e-3)


def test_feature_loss_of_different_depths_is_refused():
    with pytest.raises(ValueError, match="1 hidden states and the teacher 2"):
        feature_distillation([torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)] * 2)
