"""A whole packed classifier in one call of the kernels, from pixels to logits.

What transformers does around the blocks (masks that are not there, outputs by name, patches by copies) takes as long as a
quarter of them in a small model. So where nobody looks at any module, all of it is one job; it computes what the modules
compute one by one, bit for bit. In all other cases they are called.
"""

import ctypes
import threading
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn
from transformers import (
    DeiTForImageClassification,
    PreTrainedModel,
    SwinForImageClassification,
    ViTForImageClassification,
)
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
    NOT_FINITE,
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
from .packed_blocks import OneJob, PackedAttention, kernels_take
from .packed_encoder import may_be_run, prepare_chain
from .packed_layers import PackedConv2d, PackedLayer, PackedLinear
from .quiet_modules import Quiet, quiet_modules


#: The classifiers that are taken, and the classes of the modules in whose place a job is, beside those of blocks.
_TAKEN = {
    ViTForImageClassification: (ViTModel, ViTEmbeddings, ViTPatchEmbeddings),
    DeiTForImageClassification: (DeiTModel, DeiTEmbeddings, DeiTPatchEmbeddings),
    SwinForImageClassification: (SwinModel, SwinEmbeddings, SwinPatchEmbeddings),
}

#: What transformers' and torch's classes do there. Somebody may have them do something else.
_FORWARDS = {
    kind: kind.forward
    for kind in (*_TAKEN, *sum(_TAKEN.values(), ()), SwinEncoder, SwinStage, SwinPatchMerging, nn.Dropout)
}

#: Sizes of batches whose jobs are kept: a data set has two, and a server as many as it takes requests at once. One takes
#: 0.15 MB in a model of twelve blocks, since all share the weights; to make it anew, as long as some images.
KEPT_SIZES = 32


class ModelJob:
    """The jobs of a whole classifier, one for each size of the images."""

    def __init__(self) -> None:
        # Replaced and not changed, as other threads may be looking.
        self._of_size: dict[tuple[int, ...], _Made] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        # Addresses mean nothing to a copy, or in another process.
        return type(self), ()

    def forget(self) -> None:
        """Make them anew at the next call, whatever the tensors say."""
        self._of_size = {}

    def run(self, backbone: PreTrainedModel, pixel_values: Tensor, kwargs: dict) -> Tensor | None:
        """Logits `(batch, classes)`; None where the modules are to be called.

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
        whole = self._prepared(backbone, tuple(pixel_values.shape))
        if whole is None or any(module.maps_are_wanted(kwargs) for module in whole.attention):
            return None
        job = Model.from_buffer_copy(whole.job)
        logits = pixel_values.new_empty((pixel_values.shape[0], whole.classes))
        job.x, job.y = pixel_values.data_ptr(), logits.data_ptr()
        kernels = library()
        status = kernels.quantformer_model(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for)
        if status == NOT_FINITE:
            # Of such an image the modules know what to say.
            return None
        check(status)
        return logits

    def _prepared(self, backbone: nn.Module, size: tuple[int, ...]) -> "_Whole | None":
        before = self._of_size.get(size)
        if before is not None and before.holds(backbone):
            return before.whole
        inside = quiet_modules(backbone)
        if inside is None:
            return None
        quiet = Quiet(backbone, inside)
        # Another thread may have changed them after they were looked at.
        if quiet_modules(backbone) != inside:
            return None
        if before is not None and quiet.has_those_of(before.quiet) and before.facts_hold():
            # They are lent for a call, say, by `torch.func.functional_call`.
            made = replace(before, quiet=quiet)
        else:
            # Also under inference_mode, made tensors must serve later calls outside it.
            with torch.inference_mode(False), torch.no_grad():
                made = _Made(quiet, *prepare(backbone, *size))
        with self._lock:
            # Where the model has changed, those of other sizes keep what it was.
            others = [(of, other) for of, other in self._of_size.items() if of != size and other.holds(backbone)]
            self._of_size = dict([*others[-(KEPT_SIZES - 1) :], (size, made)])
        return made.whole


@dataclass(frozen=True)
class _Whole:
    """A job, and what it stands for.

    Attributes:
        job: but for pixels and logits.
        classes: how many.
        attention: the modules of attention in whose place it is.
        kept: what the job points into.
    """

    job: Model
    classes: int
    attention: list[PackedAttention]
    kept: object


@dataclass(frozen=True)
class _Made:
    """What was made of a model.

    Attributes:
        quiet: the modules and tensors of which it was.
        whole: None where nothing stands for these.
        facts: what else was looked at: something, the name of its attribute, and what that was.
    """

    quiet: Quiet
    whole: _Whole | None
    facts: list[tuple[object, str, object]]

    def holds(self, backbone: nn.Module) -> bool:
        """Whether the same would be made of `backbone` now."""
        return self.quiet.holds(backbone) and self.facts_hold()

    def facts_hold(self) -> bool:
        return all(getattr(owner, name) == value for owner, name, value in self.facts)


class _NotHere(Exception):
    """The modules are not those that a job could be made of."""


@dataclass
class _Steps:
    """Steps as they are made, and what the rows of the last one are.

    Attributes:
        batch: images.
        rows: of an image.
        width: numbers of a row.
        attention, kept: as of `_Whole`.
        facts: as of `_Made`.
    """

    batch: int
    rows: int = 0
    width: int = 0
    steps: list[Step] = field(default_factory=list)
    attention: list[PackedAttention] = field(default_factory=list)
    kept: list = field(default_factory=list)
    facts: list = field(default_factory=list)

    def be_sure_of(self, module: nn.Module, kind: type) -> None:
        """That `module` is of this class, and the class does what it did when it was imported."""
        if kind in _FORWARDS:
            self.look_at(kind, "forward")
        if type(module) is not kind or kind.forward is not _FORWARDS.get(kind, kind.forward):
            raise _NotHere

    def look_at(self, owner: object, *names: str) -> None:
        """Take down what these attributes are, which are no tensors."""
        facts = ((owner, name, getattr(owner, name)) for name in names)
        self.facts += [fact for fact in facts if fact not in self.facts]

    def add(self, job: ctypes.Structure, rows: int, width: int, *points_into: object) -> None:
        self.rows, self.width = rows, width
        address = ctypes.cast(ctypes.pointer(job), ctypes.c_void_p)
        self.steps.append(Step(STEP_KINDS[type(job)], address, self.batch * rows * width))
        self.kept += [job, *points_into]

    def add_linear(
        self, layer: PackedLayer, rows: int, starts: Tensor, length: int, norm: nn.LayerNorm | None = None
    ) -> None:
        """A linear of `rows` rows of each image, each of which reads the runs that begin at `starts` `(rows, runs)`."""
        channels, image_size = layer.channel_plan(), self.rows * self.width
        if not isinstance(channels, ChannelPlan) or channels.channels != starts.shape[1] * length:
            raise _NotHere
        if image_size > torch.iinfo(torch.int32).max:
            raise _NotHere
        plan = layer.plan(channels)
        product, ordered = plan.ordered_job()
        codes = Codes.from_buffer_copy(channels.job)
        codes.rows = self.batch * rows
        starts = starts.to(torch.int32).contiguous()
        runs = Runs(starts.data_ptr(), rows, starts.shape[1], length, image_size)
        made = None if norm is None else ctypes.pointer(self.layer_norm(norm, channels.channels))
        self.add(Linear(runs, made, codes, product), rows, product.outputs, channels, plan, ordered, starts, made)

    def add_norm(self, norm: nn.LayerNorm) -> None:
        self.be_sure_of(norm, InferenceLayerNorm)
        job = Norm(0, self.batch * self.rows, self.width, self.layer_norm(norm, self.width), 0)
        self.add(job, self.rows, self.width)

    def layer_norm(self, norm: nn.LayerNorm, channels: int) -> LayerNorm:
        if not norm.packed or norm.normalized_shape != (channels,):
            raise _NotHere
        weight, bias = norm.weight, norm.bias
        self.look_at(norm, "eps")
        self.kept += [weight, bias]
        return operators.prepare_layer_norm(channels, weight, bias, norm.eps)

    def add_blocks(self, blocks: nn.ModuleList, kept: int, *geometry) -> None:
        """Blocks, of whose output the first `kept` rows are wanted."""
        if not len(blocks):
            raise _NotHere
        places = []
        for block in blocks:
            for part in (block, *block.children()):
                if isinstance(part, OneJob):
                    self.look_at(type(part), "forward")
            if not may_be_run(block) or block.layernorm_before.normalized_shape != (self.width,):
                raise _NotHere
            places.append(block.place(*geometry))
            self.look_at(block, *block.PLACED_BY)
            self.look_at(block.attention, *block.attention.SIZED_BY)
            self.look_at(block.layernorm_before, "eps")
            self.look_at(block.layernorm_after, "eps")
            self.attention.append(block.attention)
        prepared = prepare_chain(list(blocks), self.batch, self.rows, kept, *places)
        if prepared is None:
            raise _NotHere
        self.add(Blocks(prepared[0], len(blocks), 0, 0), kept, self.width, prepared)


def prepare(backbone: nn.Module, batch: int, channels: int, height: int, width: int) -> tuple[_Whole | None, list]:
    """What stands for `backbone` with images of one size, None where nothing does; and the facts that were looked at."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    # What transformers casts and moves, the modules do.
    if any(not tensor.is_cpu or (tensor.is_floating_point() and tensor.dtype != torch.float32) for tensor in tensors):
        return None, []
    steps = _Steps(batch, channels * height, width)
    try:
        base = getattr(backbone, backbone.base_model_prefix)
        of_base, of_embeddings, of_patches = _TAKEN[type(backbone)]
        for module, kind in ((backbone, type(backbone)), (base, of_base), (base.embeddings, of_embeddings)):
            steps.be_sure_of(module, kind)
        patches = base.embeddings.patch_embeddings
        steps.be_sure_of(patches, of_patches)
        steps.be_sure_of(base.embeddings.dropout, nn.Dropout)
        # Their indices are for the kernels, whatever device the caller makes tensors on.
        with torch.device("cpu"):
            grid = _add_patches(steps, patches.projection, channels, height, width)
            if of_base is SwinModel:
                _add_swin(steps, base, grid)
                # Its classifier reads a mean that has been normalized.
                _add_classifier(steps, backbone.classifier, None)
            else:
                _add_vit(steps, base, (height, width))
                _add_classifier(steps, backbone.classifier, base.layernorm)
    except _NotHere:
        return None, steps.facts
    array = (Step * len(steps.steps))(*steps.steps)
    job = Model(array, len(array), batch * channels * height * width, 0, 0)
    return _Whole(job, steps.width, steps.attention, (steps, array)), steps.facts


def _add_patches(steps: _Steps, projection: nn.Module, channels: int, height: int, width: int) -> tuple[int, int]:
    """The patch embedding; how many patches there are in each direction."""
    steps.be_sure_of(projection, PackedConv2d)
    if not projection.can_infer() or projection.in_channels != channels:
        raise _NotHere
    tall, wide = projection.kernel_size
    grid = height // tall, width // wide
    if height % tall or width % wide or 0 in grid:
        raise _NotHere
    # Of each patch, channel by channel, the first pixel of each of its rows.
    patches = torch.arange(grid[0]).view(-1, 1) * (tall * width) + torch.arange(grid[1]) * wide
    rows = torch.arange(channels).view(-1, 1) * (height * width) + torch.arange(tall) * width
    steps.add_linear(projection, prod(grid), patches.view(-1, 1) + rows.view(1, -1), wide)
    return grid


def _add_vit(steps: _Steps, base: nn.Module, size: tuple[int, int]) -> None:
    embeddings = base.embeddings
    if base.pooler is not None or tuple(embeddings.image_size) != size:
        raise _NotHere
    special = [embeddings.cls_token]
    if type(base) is DeiTModel:
        special.append(embeddings.distillation_token)
    positions, rows = embeddings.position_embeddings, len(special) + steps.rows
    shapes = [token.shape == (1, 1, steps.width) and token.is_contiguous() for token in special]
    if not all(shapes) or positions.shape != (1, rows, steps.width) or not positions.is_contiguous():
        raise _NotHere
    lead = (ctypes.c_void_p * 2)(*(token.data_ptr() for token in special))
    job = Tokens(lead, positions.data_ptr(), steps.batch, len(special), steps.rows, steps.width)
    steps.add(job, rows, steps.width, positions, *special)
    # The classifier reads the first of these alone.
    steps.add_blocks(base.layers, CLASS_TOKENS[base.config.model_type])
    steps.be_sure_of(base.layernorm, InferenceLayerNorm)


def _add_swin(steps: _Steps, base: nn.Module, grid: tuple[int, int]) -> None:
    steps.be_sure_of(base.encoder, SwinEncoder)
    steps.be_sure_of(base.pooler, InferenceMean)
    if base.embeddings.position_embeddings is not None:
        raise _NotHere
    steps.add_norm(base.embeddings.norm)
    for stage in base.encoder.layers:
        steps.be_sure_of(stage, SwinStage)
        steps.add_blocks(stage.blocks, steps.rows, grid, False)
        if stage.downsample is not None:
            grid = _add_merging(steps, stage.downsample, grid)
    steps.add_norm(base.layernorm)
    steps.add(Mean(steps.batch, steps.rows, steps.width), 1, steps.width)


def _add_merging(steps: _Steps, merging: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
    steps.be_sure_of(merging, SwinPatchMerging)
    norm, reduction = merging.norm, merging.reduction
    steps.be_sure_of(norm, QuantLayerNorm)
    steps.be_sure_of(reduction, PackedLinear)
    if not norm.gives_codes or reduction.reads is not norm.output_quantizer or any(side % 2 for side in grid):
        raise _NotHere
    rows = torch.arange(prod(grid)).view(grid)
    # Four neighbours, side by side: down first, as transformers has them.
    order = torch.stack([rows[row::2, column::2] for column in range(2) for row in range(2)], -1)
    steps.add_linear(reduction, prod(grid) // 4, order.flatten(0, 1) * steps.width, steps.width, norm)
    return order.shape[:2]


def _add_classifier(steps: _Steps, classifier: nn.Module, norm: nn.LayerNorm | None) -> None:
    """The classifier of the first row of each image."""
    steps.be_sure_of(classifier, PackedLinear)
    if classifier.input_quantizer is None:
        raise _NotHere
    steps.add_linear(classifier, 1, torch.zeros(1, 1, dtype=torch.int32), steps.width, norm)
