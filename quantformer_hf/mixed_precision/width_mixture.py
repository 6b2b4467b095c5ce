"""EdMIPS (arXiv 2004.05795): quantizers that are a softmax mixture over candidate widths, and their expected cost."""

import torch
from torch import Tensor, nn

from ..ops import fake_quantize_widths, scale_gradient
from ..quantize import reading_layers
from ..quantizers import (
    GroupActivationQuantizer,
    WeightQuantizer,
    build_weight_quantizer,
)
from .candidates import grouped_quantizer
from .cost import Cost
from .search_space import SearchSpace
from .solver import Losses


class WeightWidthMixture(nn.Module):
    """`ŵ = Σ_k softmax(logits)_k Q_k(w)`, one weight for all widths.

    Args:
        quantizers: one a candidate, calibrated, in ascending order of bits.
    """

    #: No weight has one level: there are no codes, and evaluations are in floating point.
    hard = False

    def __init__(self, quantizers: list[WeightQuantizer]):
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.logits = nn.Parameter(torch.zeros(len(quantizers)))
        self.register_buffer("qmax", torch.tensor([float(q.grid.levels - 1) for q in quantizers]))

    def forward(self, weight: Tensor) -> Tensor:
        """Of the shape of `weight`, `(out, in)`."""
        scales, offsets = [], []
        for quantizer in self.quantizers:
            scale = scale_gradient(quantizer.step(weight).abs(), quantizer.gradient_scale(weight))
            scales.append(scale)
            # As an unsigned grid that begins at the smallest level.
            offsets.append((quantizer.grid.qmin + quantizer.shift) * scale)
        # Columns are output channels here.
        parameters = torch.stack(scales), torch.stack(offsets), self.logits.softmax(0), self.qmax
        return fake_quantize_widths(weight.T, *parameters).T


class ActivationWidthMixture(nn.Module):
    """`x̂_c = Σ_k softmax(logits)_k Q_k(x_c)`; each candidate has frozen groups of its own.

    Args:
        quantizers: one a candidate, in the stage `finetune`, in ascending order of bits.
    """

    hard = False

    def __init__(self, quantizers: list[GroupActivationQuantizer]):
        super().__init__()
        self.producer = quantizers[-1].producer
        self.quantizers = nn.ModuleList(quantizers)
        self.logits = nn.Parameter(torch.zeros(len(quantizers)))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` in and out; the class token is mixed by those candidates' quantizers that are its own."""
        mixed = []
        for parts in zip(*(quantizer.parts(x) for quantizer in self.quantizers), strict=True):
            mixed.append(self._mix([quantizer for quantizer, _ in parts], parts[0][1]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, -2)

    def _mix(self, quantizers: list[GroupActivationQuantizer], x: Tensor) -> Tensor:
        scales, offsets = [], []
        for quantizer in quantizers:
            factor = (x[0].numel() / quantizer.scale.numel() * quantizer.grid.qmax) ** -0.5
            index = quantizer.group_index.long()
            scales.append(scale_gradient(quantizer.step(), factor)[index])
            offsets.append(scale_gradient(quantizer.offset, factor)[index])
        grids = [quantizer.grid for quantizer in quantizers]
        qmax = torch.tensor([float(grid.qmax) for grid in grids], device=x.device)
        knee = torch.tensor([float(grid.qmax if grid.knee is None else grid.knee) for grid in grids], device=x.device)
        parameters = torch.stack(scales), torch.stack(offsets), self.logits.softmax(0), qmax
        return fake_quantize_widths(x, *parameters, self.producer, knee)


class WidthMixtures:
    """The mixtures of a model, by the names of the search space.

    Args:
        model: calibrated, in the stage `pretrain`. Its quantizers are replaced: it is for the search alone.
        space: the choices.
    """

    def __init__(self, model: nn.Module, space: SearchSpace):
        self.space = space
        backbone, config = model.backbone, model.config
        readers = reading_layers(backbone)
        for name in space.inputs:
            layer = backbone.get_submodule(name)
            quantizers = [
                build_weight_quantizer(config.weight_quantizer, b, layer.out_features) for b in space.weight_bits
            ]
            for quantizer in quantizers:
                quantizer.to(layer.weight.device).calibrate(layer.weight)
            layer.weight_quantizer = WeightWidthMixture(quantizers).to(layer.weight.device)
        for name in space.quantizers:
            quantizer = backbone.get_submodule(name)
            candidates = [
                grouped_quantizer(
                    quantizer, bits, config.num_groups, readers[quantizer], config.twin_levels is not False
                )
                for bits in space.activation_bits
            ]
            backbone.set_submodule(name, ActivationWidthMixture(candidates).to(quantizer.scale.device))
        self.weights = {name: backbone.get_submodule(name).weight_quantizer for name in space.inputs}
        self.inputs = {name: backbone.get_submodule(name) for name in space.quantizers}

    def logits(self) -> list[nn.Parameter]:
        """What is searched."""
        return [mixture.logits for mixture in (*self.weights.values(), *self.inputs.values())]

    def expected_cost(self, cost: Cost) -> Tensor:
        """`Σ_l Σ_wa p_w p_a cost_l(w, a)`, over the first layer's at its widest: scalar (EdMIPS, section 3.5)."""
        first = next(iter(self.space.inputs))
        unit = cost.shares[first][self.space.weight_bits[-1], self.space.activation_bits[-1]]
        total = torch.zeros(())
        for name, quantizer in self.space.inputs.items():
            logits = self.weights[name].logits
            table = [
                [cost.shares[name][w, a] / unit for a in self.space.activation_bits] for w in self.space.weight_bits
            ]
            matrix = torch.tensor(table, device=logits.device)
            total = total.to(logits.device) + logits.softmax(0) @ matrix @ self.inputs[quantizer].logits.softmax(0)
        return total

    def losses(self) -> Losses:
        """`-log p` of each choice: least where each mixture has its argmax; under a budget, the likeliest allocation."""

        def of(mixtures: dict[str, nn.Module], candidates: tuple[int, ...]) -> dict[str, dict[int, float]]:
            surprise = {name: (-mixture.logits.log_softmax(0)).tolist() for name, mixture in mixtures.items()}
            return {name: dict(zip(candidates, values, strict=True)) for name, values in surprise.items()}

        return Losses(of(self.weights, self.space.weight_bits), of(self.inputs, self.space.activation_bits))
