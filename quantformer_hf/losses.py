"""The losses of the method, each a plain function of tensors.

`L = L_task + aux_weight * L_attention + dm_weight * L_assignment + distillation_weight * L_distillation
+ feature_weight * L_features`
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .spaced import step_between


def _check_same_depth(student: Sequence[Tensor], teacher: Sequence[Tensor], what: str) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"the quantized model has {len(student)} {what} and the teacher {len(teacher)}: the teacher must have the same"
            f" architecture"
        )


def attention_rank_consistency(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], degrees: Tensor, batch_size: int
) -> Tensor:
    """`mean over layers l and samples of ‖n(A_q^l) - n((A_fp^l)^(p_l))‖²`; `n` flattens a sample and L2-normalises it.

    It lies in [0, 2] (Quantformer, section 3.3). The reference divides by the number of entries, heads * tokens², as
    well, and sums over the layers: its weight w is `w * layers / (heads * tokens²)` here.

    Args:
        student_maps: attention probabilities of the quantized model, one `(batch, heads, tokens, tokens)` a layer; Swin's
            batch counts windows, those of one image together.
        teacher_maps: likewise of the full-precision model.
        degrees: concentration degree p of each layer, `(layers,)`.
        batch_size: number of images.

    Raises:
        ValueError: the two models have different numbers of attention blocks.
    """
    _check_same_depth(student_maps, teacher_maps, "attention blocks")
    distances = []
    for student, teacher, degree in zip(student_maps, teacher_maps, degrees.unbind(), strict=True):
        taught = teacher.detach().float().reshape(batch_size, -1)
        # Powers of probabilities that are small throughout would underflow; n takes any factor back.
        sharpened = (taught / taught.amax(1, keepdim=True)).pow(degree)
        similarity = F.cosine_similarity(student.float().reshape(batch_size, -1), sharpened, dim=1)
        # ‖a - b‖² = 2 - 2 a·b for unit vectors.
        distances.append(2 - 2 * similarity.mean())
    return torch.stack(distances).mean()


def assignment_entropy(assignment_probabilities: Sequence[Tensor]) -> Tensor:
    """`mean over layers and channels c of -Σ_g P_gc log P_gc`, in nats (the reference's `dm` term).

    Args:
        assignment_probabilities: `softmax(α)`, one `(groups, channels)` a layer.
    """
    # A probability that underflows to zero adds nothing, and must not bring the infinite slope of its logarithm.
    entropies = [-(p * p.clamp_min(1e-30).log()).sum(0) for p in assignment_probabilities]
    return torch.cat(entropies).mean()


def logit_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T² KL(softmax(t / T) ‖ softmax(s / T))`, mean over the batch (Hinton et al., arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: `(batch, classes)`.
        temperature: T.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def feature_distillation(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """`mean over blocks, samples, tokens and channels of (n(h_q) - n(h_fp))²`; `n` is LayerNorm without weights.

    Hidden states matched block by block, as hints (FitNets, arXiv 1412.6550). Normalised like the input of the
    next block, so that the few tokens with huge values do not outweigh all others. It lies in [0, 4].

    Args:
        student_features: hidden states of the quantized model, `(batch, tokens, channels)` each; what enters the first
            block comes first and is compared as well.
        teacher_features: likewise of the full-precision model.

    Raises:
        ValueError: the two models have different numbers of hidden states.
    """
    _check_same_depth(student_features, teacher_features, "hidden states")
    distances = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        channels = student.shape[-1:]
        distances.append(
            F.mse_loss(F.layer_norm(student.float(), channels), F.layer_norm(teacher.detach().float(), channels))
        )
    return torch.stack(distances).mean()


def mean_row_entropy(rows: Tensor, degree: float | Tensor = 1.0) -> Tensor:
    """Mean entropy, in nats, of the rows of `rows^degree`, each normalised to sum to one.

    Args:
        rows: `(..., tokens)`, not negative.
    """
    log_probabilities = F.log_softmax(rows.clamp_min(1e-30).log() * degree, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


@torch.no_grad()
def entropy_matching_degree(
    teacher_rows: Tensor, target_entropy: Tensor, largest: float = 16.0, iterations: int = 24
) -> Tensor:
    """The p in `[1, largest]` at which `mean_row_entropy(teacher_rows, p)` equals `target_entropy`.

    The entropy falls monotonically in p, so bisection finds it: the capacity of the quantized model's attention decides
    how far the full-precision map is sharpened (Quantformer, section 3.3, "concentration degree").

    Args:
        teacher_rows: rows of full-precision attention probabilities, `(..., tokens)`.
        target_entropy: scalar, `mean_row_entropy` of the quantized model's rows.

    Returns:
        scalar; 1 or `largest` where the target lies outside.
    """
    low = torch.ones((), device=teacher_rows.device)
    high = torch.full_like(low, largest)
    for _ in range(iterations):
        middle = (low + high) / 2
        too_flat = mean_row_entropy(teacher_rows, middle) > target_entropy
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    degree = (low + high) / 2
    return torch.where(mean_row_entropy(teacher_rows) <= target_entropy, torch.ones_like(degree), degree)


@torch.no_grad()
def evenly_spaced_rows(maps: Tensor, images: int, rows_per_image: int) -> Tensor:
    """Rows of attention maps, as many from each image wherever it is processed, `(rows, tokens)`.

    Args:
        maps: attention probabilities, `(batch, heads, tokens, tokens)`; Swin's batch counts windows, those of one image
            together.
        images: number of images in the batch.
        rows_per_image: at most.
    """
    rows = maps.detach().float().reshape(images, -1, maps.shape[-1])
    step = step_between(rows.shape[1], rows_per_image)
    return rows[:, ::step][:, :rows_per_image].reshape(-1, maps.shape[-1])
