"""The classes that modules of transformers have in a packed model."""

from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer, SwinMLP
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP

from .packed_blocks import Job, PackedAttention, PackedMlp
from .packed_encoder import PackedBlock, PackedPlainBlock, PackedWindowBlock
from .packed_model import ModelJob


class PackedViTMLP(PackedMlp, ViTMLP):
    pass


class PackedDeiTMLP(PackedMlp, DeiTMLP):
    pass


class PackedSwinMLP(PackedMlp, SwinMLP):
    pass


class PackedViTAttention(PackedAttention, ViTAttention):
    pass


class PackedDeiTAttention(PackedAttention, DeiTAttention):
    pass


class PackedSwinAttention(PackedAttention, SwinAttention):
    def _mask(self, attention_mask: Tensor | None, batch: int) -> Tensor:
        """The relative position bias, and what hides from each other tokens of a window that were shifted together."""
        bias = self.relative_position_bias()
        if attention_mask is None:
            return bias
        windows = bias + attention_mask.unsqueeze(1)
        return windows.repeat(batch // len(windows), 1, 1, 1)


class PackedViTLayer(PackedPlainBlock, ViTLayer):
    pass


class PackedDeiTLayer(PackedPlainBlock, DeiTLayer):
    pass


class PackedSwinLayer(PackedWindowBlock, SwinLayer):
    pass


#: The class that a module of each class has in a packed model: parameters and submodules are the same.
PACKED_FORMS = {
    ViTMLP: PackedViTMLP,
    DeiTMLP: PackedDeiTMLP,
    SwinMLP: PackedSwinMLP,
    ViTAttention: PackedViTAttention,
    DeiTAttention: PackedDeiTAttention,
    SwinAttention: PackedSwinAttention,
    ViTLayer: PackedViTLayer,
    DeiTLayer: PackedDeiTLayer,
    SwinLayer: PackedSwinLayer,
}
for _form in PACKED_FORMS.values():
    # Not in the classes themselves: `GradientCheckpointingLayer` wraps the `forward` of each class that is made of it.
    _form._own_forward = _form.forward

PLAIN_FORMS = {packed: plain for plain, packed in PACKED_FORMS.items()}


def choose_forms(backbone: nn.Module, packed: bool) -> None:
    """Give the modules of `backbone` their classes for a packed model, or those of transformers."""
    forms = PACKED_FORMS if packed else PLAIN_FORMS
    if packed:
        backbone.whole = ModelJob()
    elif hasattr(backbone, "whole"):
        del backbone.whole
    for module in backbone.modules():
        if type(module) in forms:
            module.__class__ = forms[type(module)]
            module._job = Job()
            if isinstance(module, PackedBlock):
                module._chain, module._alone = Job(), Job()
