"""Measure packed linears of a model's shapes at each width, for budgets in milliseconds: a CSV file."""

import argparse
import logging
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_files import first_sentence
from ..checkpoints import load_full_precision
from ..classifiers import is_quantized
from ..configuration_quantformer import QuantformerConfig
from ..kernels import operators
from ..kernels.library import library
from ..layers import QuantLinear
from ..modeling_quantformer import QuantformerForImageClassification
from ..packed_layers import PackedLinear, packed_form
from ..progress import progress
from ..quantizers import GroupActivationQuantizer, build_weight_quantizer
from ..report import format_table
from .cost import CostModel, one_image
from .latency_table import LatencyKey, LatencyTable
from .search_space import CANDIDATE_BITS, SearchSpace, check_candidates


logger = logging.getLogger(__name__)

#: Bits at which the whole model is timed, to find what its linears do not explain.
REFERENCE_BITS = 4

#: What a time rests on beside the widths of the linears.
TIMED_SETTINGS = ("num_groups", "class_token_bits", "attention_bits", "embedding_bits", "classifier_bits")

#: Rounds that are not timed, before those that are.
WARM_UP = 3

#: Rounds that are.
ROUNDS = 50


def packed_linear(key: LatencyKey) -> PackedLinear:
    """A packed linear with random weights, and a quantizer of its input with random groups."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(key.in_features, key.out_features)
    weights = build_weight_quantizer("lsq_by_width", key.weight_bits, key.out_features)
    weights.calibrate(linear.weight)
    inputs = GroupActivationQuantizer(
        key.in_features,
        key.activation_bits,
        "measured",
        True,
        "identity",
        "packed",
        key.num_groups,
        whole_multiples=True,
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


def median_milliseconds(functions: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """The median time of each function. All run in each round, in an order drawn anew: they then meet the same disturbances
    and the same states of the caches, and what is timed while the machine is slow does not seem slower than the others.
    """
    order = random.Random(0)
    cuda = torch.cuda.is_available()
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for number in progress(range(WARM_UP + rounds), "Measuring latency, rounds"):
        for name, function in order.sample(list(functions.items()), len(functions)):
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(measured) for name, measured in times.items()}


@torch.inference_mode()
def measure_latency(
    model: PreTrainedModel,
    candidates: tuple[int, ...] = CANDIDATE_BITS,
    rounds: int = ROUNDS,
    device: str = "cpu",
    **settings: int | None,
) -> LatencyTable:
    """Time each shape of linear in `model` for one image at each pair of widths, and what else a forward pass takes.

    Each linear quantizes its own input, and has its weights as in a block of a packed model. The rest is the time of the
    whole packed model at `REFERENCE_BITS`, less the times of its linears there; zero if they, measured alone, take longer
    than all together. So what attention products and a class token with bits of its own take is counted there.

    Args:
        model: full-precision image classifier.
        candidates: bits; activations leave out 1.
        rounds: times that each is run; their median counts.
        device: to measure on.
        settings: arguments of `QuantformerConfig` among `TIMED_SETTINGS`.
    """
    quantized = QuantformerForImageClassification.from_full_precision(model, bit_width=REFERENCE_BITS, **settings)
    num_groups = quantized.config.num_groups
    space = SearchSpace.of(quantized.config, candidates)
    costs = CostModel(quantized.config, space)

    def key_of(name: str, *bits: int) -> LatencyKey:
        layer = quantized.backbone.get_submodule(name)
        return LatencyKey(costs.products[name].rows, layer.in_features, layer.out_features, num_groups, *bits)

    at_reference = [key_of(name, REFERENCE_BITS, REFERENCE_BITS) for name in space.inputs]
    keys = [key_of(name, *pair) for name in space.inputs for pair in costs.pairs()]
    functions: dict[Any, Callable] = {key: _on_noise(key, device) for key in dict.fromkeys([*keys, *at_reference])}
    functions["whole"] = _packed(quantized, one_image(quantized.config, "cpu"), device)
    times = median_milliseconds(functions, rounds)
    whole = times.pop("whole")
    linears = sum(times[key] for key in at_reference)
    if linears > whole:
        logger.warning(
            f"the linears at W{REFERENCE_BITS}A{REFERENCE_BITS}, measured one by one, take {linears:.3f} ms, and the whole"
            f" model {whole:.3f} ms: other work disturbed the measurement. Repeat it on an idle machine"
        )
    return LatencyTable(times, rest=max(0.0, whole - linears))


def _on_noise(key: LatencyKey, device: str) -> Callable[[], Any]:
    """A call of the packed linear of `key`, as the blocks of a packed model run it."""
    linear = packed_linear(key).to(device)
    x = torch.randn(1, key.rows, key.in_features, device=device)
    if not x.is_cpu or library() is None:
        return lambda: linear(x)
    # There blocks have the weights in the order of the kernels, in which W2A2 may be faster than anything else.
    channels = linear.channel_plan()
    job, kept = linear.plan(channels).ordered_job()
    # With what the job points into.
    return lambda: (operators.run_multiply(job, channels.quantize(x)), linear, kept)[0]


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
    for name in TIMED_SETTINGS:
        default = getattr(QuantformerConfig(), name)
        parser.add_argument(f"--{name}", type=int, default=default, help="of the models (default: %(default)s)")
    for name in ("image_size", "window_size"):
        parser.add_argument(f"--{name}", type=int, help="other than the checkpoint's")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each, of which the median counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(arguments: Any) -> None:
    """Write the table of `arguments.model`, and print it."""
    candidates = check_candidates(arguments.candidate_bits)
    if arguments.rounds < 1:
        raise ValueError(f"rounds is {arguments.rounds}: choose at least 1")
    settings = {name: getattr(arguments, name) for name in TIMED_SETTINGS}
    QuantformerConfig(**settings)
    _check_device(arguments.device)
    if is_quantized(arguments.model):
        raise ValueError(
            f"{arguments.model} is quantized already: name the full-precision model, which is measured at each width"
        )
    sizes = {"image_size": arguments.image_size, "window_size": arguments.window_size}
    model = load_full_precision(arguments.model, **sizes).model
    output = Path(arguments.output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: name another file by --output")
    # Whether it can be written shows now, and not after minutes of measuring.
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    try:
        table = measure_latency(model, candidates, arguments.rounds, arguments.device, **settings)
        table.write(output)
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    rows = [[*str(key).rsplit(", ", 1), f"{time:.3f}"] for key, time in table.times.items()]
    rows.append(["everything else in the model", "", f"{table.rest:.3f}"])
    threads = torch.get_num_threads()
    print(format_table([f"one image, {threads} thread{'s' if threads > 1 else ''}", "bits", "ms"], rows))
    print(f"\nThe table is in {output}")


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {name}, which torch does not find here ({first_sentence(error)}): leave it out to measure on the CPU"
        ) from error
