"""A whole packed classifier in one call of the kernels, from pixels to logits.

What transformers does around the blocks (masks that are not there, outputs by name, patches by copies) takes as long as a
quarter of them in a small model. So where nobody looks at any module, all of it is one job; it computes what the modules
compute one by one, bit for bit. In all other cases they are called.
"""

import ctypes
from dataclasses import dataclass, field
from math import isfinite, prod

import torch
from torch import Tensor, nn
from transformers import (
    DeiTForImageClassification,
    PreTrainedModel,
    SwinForImageClassification,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.deit.modeling_deit import DeiTEmbeddings, DeiTModel, DeiTPatchEmbeddings
from transformers.models.swin.modeling_swin import (
    SwinEmbeddings,
    SwinEncoder,
    SwinModel,
    SwinPatchEmbeddings,
    SwinPatchMerging,
    SwinStage,
)
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTModel, ViTPatchEmbeddings

from .class_token import CLASS_TOKENS
from .hooks import is_heard
from .kernels import ChannelPlan, operators
from .kernels.library import (
    STEP_KINDS,
    Blocks,
    Codes,
    LayerNorm,
    Linear,
    Mean,
    Model,
    Norm,
    Runs,
    Step,
    Tokens,
    check,
    library,
)
from .layers import InferenceLayerNorm, InferenceMean, QuantLayerNorm
from .packed_blocks import Job, PackedAttention, kernels_take, quiet_modules
from .packed_encoder import PackedBlock, PackedWindowBlock, prepare_chain
from .packed_layers import PackedConv2d, PackedLayer, PackedLinear


#: The classifiers that are taken, and the classes of the modules in whose place a job is, beside those of blocks.
_TAKEN = {
    ViTForImageClassification: (ViTModel, ViTEmbeddings, ViTPatchEmbeddings),
    DeiTForImageClassification: (DeiTModel, DeiTEmbeddings, DeiTPatchEmbeddings),
    SwinForImageClassification: (SwinModel, SwinEmbeddings, SwinPatchEmbeddings),
}


class ModelJob(Job):
    """The job of a whole classifier, made for images of one size."""

    def run(self, backbone: PreTrainedModel, pixel_values: Tensor, kwargs: dict) -> ImageClassifierOutput | None:
        """The logits; None where the modules are to be called.

        Args:
            backbone: a packed image classifier.
            pixel_values: `(batch, channels, height, width)`.
            kwargs: what else it is to be called with.
        """
        if not kernels_take(pixel_values) or pixel_values.dim() != 4 or pixel_values.dtype != torch.float32:
            return None
        if type(backbone) not in _TAKEN or backbone.training or is_heard(backbone):
            return None
        # Whoever wants more than the logits gets it from the modules.
        if any(value is not None and value is not False for value in kwargs.values()):
            return None
        if backbone.config.output_hidden_states:
            return None
        inside = quiet_modules(backbone)
        # Of an image that is not finite the modules know what to say; a sum is so with any of its values.
        if inside is None or not isfinite(pixel_values.sum().item()):
            return None
        size = tuple(pixel_values.shape)
        prepared = self.get(inside, lambda: prepare(backbone, *size), of=(inside, size))
        if prepared is None:
            return None
        model, (attention, classes, _) = prepared
        if any(module.maps_are_wanted({}) for module in attention):
            return None
        job = Model.from_buffer_copy(model)
        logits = pixel_values.new_empty((size[0], classes))
        job.x, job.y = pixel_values.data_ptr(), logits.data_ptr()
        kernels = library()
        check(kernels.quantformer_model(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return ImageClassifierOutput(logits=logits)


class _NotHere(Exception):
    """The modules are not those that a job could be made of."""


@dataclass
class _Steps:
    """Steps as they are made, and what the rows of the last one are.

    Attributes:
        batch: images.
        rows: of an image.
        width: numbers of a row.
        kept: what the steps point into.
    """

    batch: int
    rows: int = 0
    width: int = 0
    steps: list[Step] = field(default_factory=list)
    kept: list = field(default_factory=list)

    def add(self, job: ctypes.Structure, rows: int, width: int, *points_into: object) -> None:
        self.rows, self.width = rows, width
        address = ctypes.cast(ctypes.pointer(job), ctypes.c_void_p)
        self.steps.append(Step(STEP_KINDS[type(job)], address, self.batch * rows * width))
        self.kept += [job, *points_into]

    def add_linear(
        self, layer: PackedLayer, rows: int, starts: Tensor, length: int, norm: nn.LayerNorm | None = None
    ) -> None:
        """A linear of `rows` rows of each image, each of which reads the runs that begin at `starts` `(rows, runs)`."""
        channels = layer.channel_plan()
        if not isinstance(channels, ChannelPlan) or channels.channels != starts.shape[1] * length:
            raise _NotHere
        plan = layer.plan(channels)
        product, ordered = plan.ordered_job()
        codes = Codes.from_buffer_copy(channels.job)
        codes.rows = self.batch * rows
        starts = starts.to(torch.int32).contiguous()
        runs = Runs(starts.data_ptr(), rows, starts.shape[1], length, self.rows * self.width)
        made = None if norm is None else ctypes.pointer(_layer_norm(norm, channels.channels))
        self.add(Linear(runs, made, codes, product), rows, product.outputs, channels, plan, ordered, starts, made)

    def add_norm(self, norm: nn.LayerNorm) -> None:
        job = Norm(0, self.batch * self.rows, self.width, _layer_norm(norm, self.width), 0)
        self.add(job, self.rows, self.width, norm.weight, norm.bias)

    def add_blocks(self, blocks: nn.ModuleList, kept: int, *geometry) -> None:
        """Blocks, of whose output the first `kept` rows are wanted."""
        if not all(
            isinstance(block, PackedBlock) and block.layernorm_before.normalized_shape == (self.width,)
            for block in blocks
        ):
            raise _NotHere
        places = (block.place(*geometry) for block in blocks)
        prepared = prepare_chain(list(blocks), self.batch, self.rows, kept, *places)
        if prepared is None:
            raise _NotHere
        self.add(Blocks(prepared[0], len(blocks), 0, 0), kept, self.width, prepared)


def prepare(
    backbone: nn.Module, batch: int, channels: int, height: int, width: int
) -> tuple[Model, tuple[list[PackedAttention], int, object]] | None:
    """The job for images of one size; then the attention modules in whose place it is, how many classes there are, and what
    the job points into."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    # What transformers casts and moves, the modules do.
    if any(not tensor.is_cpu or (tensor.is_floating_point() and tensor.dtype != torch.float32) for tensor in tensors):
        return None
    try:
        base = getattr(backbone, backbone.base_model_prefix)
        embeddings, patches = base.embeddings, base.embeddings.patch_embeddings
        if (type(base), type(embeddings), type(patches)) != _TAKEN.get(type(backbone)):
            raise _NotHere
        steps = _Steps(batch, channels * height, width)
        grid = _add_patches(steps, patches.projection, channels, height, width)
        (_add_swin if type(base) is SwinModel else _add_vit)(steps, base, backbone.classifier, (height, width), grid)
    except _NotHere:
        return None
    array = (Step * len(steps.steps))(*steps.steps)
    job = Model(array, len(array), 0, 0)
    attention = [module for module in backbone.modules() if isinstance(module, PackedAttention)]
    return job, (attention, steps.width, (steps, array))


def _add_patches(steps: _Steps, projection: nn.Module, channels: int, height: int, width: int) -> tuple[int, int]:
    """The patch embedding; how many patches there are in each direction."""
    if type(projection) is not PackedConv2d or not projection.can_infer() or projection.in_channels != channels:
        raise _NotHere
    tall, wide = projection.kernel_size
    grid = height // tall, width // wide
    if height % tall or width % wide or 0 in grid:
        raise _NotHere
    pixels = torch.arange(channels * height * width).view(channels, grid[0], tall, grid[1], wide)
    # Of each patch, channel by channel, the first pixel of each row.
    starts = pixels[..., 0].permute(1, 3, 0, 2).reshape(prod(grid), channels * tall)
    steps.add_linear(projection, prod(grid), starts, wide)
    return grid


def _add_vit(
    steps: _Steps, base: nn.Module, classifier: nn.Module, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    embeddings = base.embeddings
    if base.pooler is not None or tuple(embeddings.image_size) != size:
        raise _NotHere
    special = [embeddings.cls_token]
    if type(base) is DeiTModel:
        special.append(embeddings.distillation_token)
    positions = embeddings.position_embeddings
    lead = (torch.cat(special, 1) + positions[:, : len(special)]).flatten(0, 1).contiguous()
    others = positions[0, len(special) :].contiguous()
    if len(others) != steps.rows:
        raise _NotHere
    job = Tokens(lead.data_ptr(), others.data_ptr(), steps.batch, len(special), steps.rows, steps.width)
    steps.add(job, len(special) + steps.rows, steps.width, lead, others)
    # The classifier reads the first of these alone.
    steps.add_blocks(base.layers, CLASS_TOKENS[base.config.model_type])
    _add_classifier(steps, classifier, base.layernorm)


def _add_swin(
    steps: _Steps, base: nn.Module, classifier: nn.Module, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    if base.embeddings.position_embeddings is not None or type(base.encoder) is not SwinEncoder:
        raise _NotHere
    if type(base.pooler) is not InferenceMean:
        raise _NotHere
    steps.add_norm(base.embeddings.norm)
    for stage in base.encoder.layers:
        if type(stage) is not SwinStage or not all(isinstance(block, PackedWindowBlock) for block in stage.blocks):
            raise _NotHere
        steps.add_blocks(stage.blocks, steps.rows, grid, False)
        if stage.downsample is not None:
            grid = _add_merging(steps, stage.downsample, grid)
    steps.add_norm(base.layernorm)
    steps.add(Mean(steps.batch, steps.rows, steps.width), 1, steps.width)
    _add_classifier(steps, classifier, None)


def _add_merging(steps: _Steps, merging: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
    norm, reduction = merging.norm, merging.reduction
    if type(merging) is not SwinPatchMerging or type(norm) is not QuantLayerNorm or not norm.gives_codes:
        raise _NotHere
    if type(reduction) is not PackedLinear or reduction.reads is not norm.output_quantizer or any(n % 2 for n in grid):
        raise _NotHere
    rows = torch.arange(prod(grid)).view(grid)
    # Four neighbours, side by side: down first, as transformers has them.
    order = torch.stack([rows[row::2, column::2] for column in range(2) for row in range(2)], -1)
    steps.add_linear(reduction, prod(grid) // 4, order.flatten(0, 1) * steps.width, steps.width, norm)
    return order.shape[:2]


def _add_classifier(steps: _Steps, classifier: nn.Module, norm: nn.LayerNorm | None) -> None:
    """The classifier of the first row of each image."""
    if type(classifier) is not PackedLinear or classifier.input_quantizer is None or isinstance(norm, QuantLayerNorm):
        raise _NotHere
    steps.add_linear(classifier, 1, torch.zeros(1, 1, dtype=torch.long), steps.width, norm)


def _layer_norm(norm: nn.LayerNorm, channels: int) -> LayerNorm:
    if not isinstance(norm, InferenceLayerNorm) or not norm.packed or norm.normalized_shape != (channels,):
        raise _NotHere
    return operators.prepare_layer_norm(channels, norm.weight, norm.bias, norm.eps)
