"""Scales, offsets and bits of their own for the class token.

Of a ViT's tokens one alone is classified, and what it holds is spread otherwise than what patches hold: with a grid that is
made for these it loses most, and the model more than by the other 196 together (docs/choices.md has figures). On the one
row in 197 that it is, more bits cost next to nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .observers import QUANTILES
from .quantizers import GroupActivationQuantizer


#: First tokens of the hidden states that are no patches, by the backbone's `model_type`.
CLASS_TOKENS = {"vit": 1, "deit": 2}


class ClassTokenQuantizer(GroupActivationQuantizer):
    """The quantizer of the class token (and DeiT's distillation token), in the groups of that of all other tokens.

    It has no assignment: `scale` and `offset` `(groups,)` alone, and in the stage `pretrain` `channel_quantiles`.

    Args:
        others: the quantizer of the other tokens, of which this one becomes a part.
        bits: 2 to 8.
        tokens: how many it quantizes, the first ones.
    """

    def __init__(self, others: GroupActivationQuantizer, bits: int, tokens: int):
        # In a tuple, so that it is no submodule of its own part.
        self.__dict__["others"] = (others,)
        super().__init__(
            others.channels,
            bits,
            f"{others.name}.class_token",
            others.calibrated,
            others.producer,
            others.stage,
            others.scale.numel(),
            twin_levels=others.twin_levels,
        )
        self.tokens = tokens
        others.class_token = self

    def _make_assignment(self, stage: str, groups: int) -> None:
        if stage == "pretrain":
            self.register_buffer(
                "channel_quantiles", torch.zeros(self.channels, len(QUANTILES), device=self.scale.device)
            )

    @property
    def group_index(self) -> Tensor:
        return self.others[0].group_index

    def _planned_from(self) -> tuple[GroupActivationQuantizer, ...]:
        # The groups are those of the others.
        return self, *self.others

    def assignment_probabilities(self) -> Tensor:
        """`softmax(α)` of the other tokens' groups: `(groups, channels)`."""
        return self.others[0].assignment_probabilities()

    @torch.no_grad()
    def begin_search(self, num_groups: int, importance: Tensor | None = None, twin_levels: bool = False) -> None:
        """Fit a scale and an offset to each of the groups, which `others` has made."""
        self.set_levels(twin_levels)
        quantiles = self.channel_quantiles
        self.set_stage("search", num_groups)
        importance = torch.ones_like(quantiles[:, 0]) if importance is None else importance
        # The most probable ones, which are what remains of a search.
        groups = self.assignment_probabilities().argmax(0)
        members = F.one_hot(groups, num_groups).T.float()
        # A group that no channel has begun in is fitted to all: a search may move some there.
        members[members.sum(1) == 0] = 1
        self.fit(quantiles, importance, members)

    @torch.no_grad()
    def freeze_groups(self) -> None:
        """Take the groups that `others` has frozen."""
        self.set_stage("finetune", self.scale.numel())
