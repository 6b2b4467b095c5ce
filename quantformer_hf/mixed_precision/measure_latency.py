"""Measure packed linears of a model's shapes at each width, for budgets in milliseconds: a CSV file."""

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints import load_full_precision
from ..layers import QuantLinear
from ..modeling_quantformer import QuantformerForImageClassification
from ..packed_layers import PackedLinear, packed_form
from ..quantizers import GroupActivationQuantizer, build_weight_quantizer
from ..report import format_table
from .cost import CostModel, one_image
from .latency_table import LatencyKey, LatencyTable
from .search_space import CANDIDATE_BITS, SearchSpace, check_candidates


logger = logging.getLogger(__name__)

#: Bits at which the whole model is timed, to find what its linears do not explain.
REFERENCE_BITS = 4

#: Runs that are not timed, before those that are.
WARM_UP = 3


def packed_linear(key: LatencyKey) -> PackedLinear:
    """A packed linear with random weights, and a quantizer of its input with random groups."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(key.in_features, key.out_features)
    weights = build_weight_quantizer("lsq", key.weight_bits, key.out_features)
    weights.calibrate(linear.weight)
    inputs = GroupActivationQuantizer(
        key.in_features, key.activation_bits, "measured", True, "identity", "packed", key.num_groups
    )
    # As in a packed model: what follows from its tensors is made once, and not in each call.
    inputs.packed = True
    with torch.no_grad():
        inputs.scale.copy_((torch.rand(key.num_groups, generator=generator) + 1) / 2**key.activation_bits)
        inputs.offset.copy_(-torch.rand(key.num_groups, generator=generator))
        inputs.group_index.copy_(torch.randint(key.num_groups, (key.in_features,), generator=generator))
    layer = QuantLinear.from_float(linear, weights, inputs)
    packed = packed_form(layer)
    with torch.no_grad():
        packed.weight_quantizer.fill(layer.weight, weights)
    return packed.eval()


def least_milliseconds(function: Callable[[], Any], repetitions: int) -> float:
    """The least time of `function`: whatever else runs on the machine only ever adds to it."""
    cuda = torch.cuda.is_available()
    times = []
    for number in range(WARM_UP + repetitions):
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - start))
    return min(times)


@torch.inference_mode()
def measure_latency(
    model: PreTrainedModel,
    candidates: tuple[int, ...] = CANDIDATE_BITS,
    num_groups: int = 8,
    repetitions: int = 20,
    device: str = "cpu",
    announce: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Time each shape of linear in `model` for one image at each pair of widths, and what else a forward pass takes.

    Each linear is a `PackedLinear` that quantizes its own input. The rest is the time of the whole packed model at
    `REFERENCE_BITS`, less the times of its linears there; zero if they, measured alone, take longer than all together.

    Args:
        model: full-precision image classifier.
        candidates: bits; activations leave out 1.
        num_groups: of the inputs' quantizers.
        repetitions: of which the quickest counts.
        device: to measure on.
        announce: called with a line for each time.
    """
    quantized = QuantformerForImageClassification.from_full_precision(
        model, bit_width=REFERENCE_BITS, num_groups=num_groups
    )
    space = SearchSpace.of(quantized.config, candidates)
    costs = CostModel(quantized.config, space)
    reference = SearchSpace.of(quantized.config, (REFERENCE_BITS,))
    table = LatencyTable()

    def time_of(name: str, weight_bits: int, activation_bits: int) -> float:
        layer = quantized.backbone.get_submodule(name)
        shape = costs.products[name].rows, layer.in_features, layer.out_features, num_groups
        key = LatencyKey(*shape, weight_bits, activation_bits)
        if key not in table.times:
            x = torch.randn(1, key.rows, key.in_features, device=device)
            linear = packed_linear(key).to(device)
            table.times[key] = least_milliseconds(lambda: linear(x), repetitions)
            announce(f"{key}: {table.times[key]:.3f} ms")
        return table.times[key]

    for name in space.inputs:
        for pair in costs.pairs():
            time_of(name, *pair)
    linears = sum(time_of(name, REFERENCE_BITS, REFERENCE_BITS) for name in reference.inputs)
    image = one_image(quantized.config, "cpu")
    whole = least_milliseconds(_packed(quantized, image, device), repetitions)
    table.rest = max(0.0, whole - linears)
    if linears > whole:
        logger.warning(
            f"the linears at W{REFERENCE_BITS}A{REFERENCE_BITS}, measured one by one, take {linears:.3f} ms, and the whole"
            f" model {whole:.3f} ms: other work disturbed the measurement. Repeat it on an idle machine"
        )
    announce(
        f"whole model at W{REFERENCE_BITS}A{REFERENCE_BITS}: {whole:.3f} ms, of which its linears {linears:.3f} ms"
    )
    return table


def _packed(model: QuantformerForImageClassification, image: Tensor, device: str) -> Callable[[], Any]:
    """A forward pass of `model`, packed: calibrated on noise, since values do not change the time."""
    model.calibrate([torch.randn_like(image).repeat(2, 1, 1, 1)])
    model.begin_search().freeze_groups().pack().to(device)
    on_device = image.to(device)
    return lambda: model(on_device)


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `measure-latency`."""
    parser.add_argument("model", help="full-precision checkpoint in any form that run_quantformer.py takes")
    parser.add_argument("--output", default="latency.csv", help="the file to write (default: %(default)s)")
    parser.add_argument("--candidate_bits", type=int, nargs="+", default=list(CANDIDATE_BITS), help="widths to measure")
    parser.add_argument("--num_groups", type=int, default=8, help="groups of channels (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=20, help="runs, of which the quickest counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(arguments: Any) -> None:
    """Write the table of `arguments.model`, and print it."""
    candidates = check_candidates(arguments.candidate_bits)
    if arguments.repetitions < 1:
        raise ValueError(f"repetitions is {arguments.repetitions}: choose at least 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {arguments.device}, and torch finds no GPU: leave it out to measure on the CPU")
    model = load_full_precision(arguments.model).model
    # Now, and not after minutes of measuring.
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).touch()
    table = measure_latency(model, candidates, arguments.num_groups, arguments.repetitions, arguments.device)
    table.write(arguments.output)
    rows = [[*str(key).rsplit(", ", 1), f"{time:.3f}"] for key, time in table.times.items()]
    rows.append(["everything else in the model", "", f"{table.rest:.3f}"])
    threads = torch.get_num_threads()
    print(format_table([f"one image, {threads} thread{'s' if threads > 1 else ''}", "bits", "ms"], rows))
    print(f"\nThe table is in {arguments.output}")
