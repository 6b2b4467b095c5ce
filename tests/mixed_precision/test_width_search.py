"""EdMIPS: the mixture against the formula, its expected cost, and the search."""

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized
from test_cost import config_of
from test_ops import gradients, inputs, reference_quantize

from quantformer_hf import QuantformerTrainingArguments
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.mixed_precision.solver import AllocationProblem
from quantformer_hf.mixed_precision.width_mixture import WidthMixtures
from quantformer_hf.mixed_precision.width_search import WidthSearchTrainer
from quantformer_hf.ops import PRODUCERS, eager_functions, fake_quantize_widths


ROWS, COLUMNS = 11, 6
BITS = (2, 3, 8)
QMAX = torch.tensor([2.0**bits - 1 for bits in BITS], dtype=torch.float64)


def make_mixtures(backbone="vit", candidates=(1, 2, 4), **arguments):
    model = make_quantized(backbone, **arguments)
    model.config.num_groups = 4
    space = SearchSpace.of(model.config, candidates)
    return model, space, WidthMixtures(model, space)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("producer", list(PRODUCERS))
def test_the_mixture_and_its_gradients_are_those_of_the_formula(producer, compiled):
    shape = len(BITS), COLUMNS
    x, scale, offset, logits, upstream = inputs((2, ROWS, COLUMNS), shape, shape, (len(BITS),), (2, ROWS, COLUMNS))
    # Some scales are negative: their magnitude counts.
    scale = torch.where(scale.abs() < 0.1, 0.5, scale) * 4 / QMAX.unsqueeze(1)

    def slow(x, scale, offset, logits):
        made = PRODUCERS[producer][0](x)
        return sum(
            p * reference_quantize(made, s.abs(), o, 0, qmax)
            for p, s, o, qmax in zip(logits.softmax(0), scale, offset, QMAX, strict=True)
        )

    def fast(x, scale, offset, logits):
        if compiled:
            return fake_quantize_widths(x, scale, offset, logits.softmax(0), QMAX, producer)
        with eager_functions():
            return fake_quantize_widths(x, scale, offset, logits.softmax(0), QMAX, producer)

    expected, expected_gradients = gradients(slow, (x, scale, offset, logits), upstream)
    result, result_gradients = gradients(fast, (x, scale, offset, logits), upstream)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    for ours, reference in zip(result_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


def test_no_copy_of_an_activation_is_kept_for_each_width():
    x = torch.randn(64, COLUMNS, requires_grad=True)
    parameters = torch.rand(8, COLUMNS), torch.rand(8, COLUMNS), torch.full((8,), 1 / 8), torch.full((8,), 3.0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize_widths(x, *parameters)
    assert [tensor.numel() for tensor in kept if tensor.numel() >= x.numel()] == [x.numel()]
    assert kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("weight_quantizer", ["lsq", "lsq_shifted", "statsq", "minmax"])
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_mixture_that_is_certain_is_the_quantizer_of_that_width(backbone, weight_quantizer):
    model, space, mixtures = make_mixtures(backbone, weight_quantizer=weight_quantizer)
    with torch.no_grad():
        for number in range(len(space.weight_bits)):
            for name, mixture in mixtures.weights.items():
                mixture.logits.fill_(-1e4)[number] = 1e4
                weight = model.backbone.get_submodule(name).weight
                torch.testing.assert_close(mixture(weight), mixture.quantizers[number](weight))
        for number in range(len(space.activation_bits)):
            for mixture in mixtures.inputs.values():
                mixture.logits.fill_(-1e4)[number] = 1e4
                quantizer = mixture.quantizers[number]
                assert len(quantizer.scale) == 4
                x = torch.randn(2, 5, quantizer.channels)
                torch.testing.assert_close(mixture(x), quantizer(x))


def test_the_class_token_is_mixed_by_its_own_quantizers():
    _, space, mixtures = make_mixtures(class_token_bits=8)
    with torch.no_grad():
        for number in range(len(space.activation_bits)):
            for mixture in mixtures.inputs.values():
                mixture.logits.fill_(-1e4)[number] = 1e4
                x = torch.randn(2, 5, mixture.quantizers[number].channels)
                torch.testing.assert_close(mixture(x), mixture.quantizers[number](x))


@pytest.mark.parametrize("class_token_bits", [None, 8])
def test_everything_that_is_to_be_learned_has_a_gradient(class_token_bits):
    model, _, mixtures = make_mixtures(class_token_bits=class_token_bits)
    model.train()(pixel_values=make_batches()[0]).logits.square().sum().backward()
    scales = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("scale", "offset")]
    assert all(parameter.grad is not None for parameter in [*mixtures.logits(), *scales])


def test_gradients_of_scales_and_weights_are_those_of_the_quantizer():
    model, space, mixtures = make_mixtures()
    name = next(iter(space.inputs))
    mixture, weight = mixtures.weights[name], model.backbone.get_submodule(name).weight
    upstream = torch.randn_like(weight)
    with torch.no_grad():
        mixture.logits.fill_(-1e4)[1] = 1e4
    found = torch.autograd.grad((mixture(weight) * upstream).sum(), [weight, mixture.quantizers[1].scale])
    expected = torch.autograd.grad(
        (mixture.quantizers[1](weight) * upstream).sum(), [weight, mixture.quantizers[1].scale]
    )
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference)


def test_the_expected_cost_is_that_of_the_widths_weighted_by_their_probabilities():
    _, space, mixtures = make_mixtures(candidates=(2, 4))
    cost = CostModel(config_of("vit"), space)["BitOps"]
    first = next(iter(space.inputs))
    unit = cost.shares[first][4, 4]
    # Equal probabilities: (2 + 4) / 2 bits each.
    expected = sum(cost.shares[name][2, 2] / 4 * 9 for name in space.inputs) / unit
    assert mixtures.expected_cost(cost).item() == pytest.approx(expected)
    with torch.no_grad():
        for logits in mixtures.logits():
            logits.copy_(torch.tensor([30.0, -30.0]))
    narrow = (cost.total(space.uniform(2, 2)) - cost.fixed) / unit
    assert mixtures.expected_cost(cost).item() == pytest.approx(narrow)


def train(backbone, cost_weight, tmp_path, steps=8, **flags):
    model, space, mixtures = make_mixtures(backbone, candidates=(2, 4))
    costs = CostModel(model.config, space)
    arguments = QuantformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        task_weight=0.0, distillation_weight=1.0, logging_steps=1, **flags,
    )  # fmt: skip
    images = [{"pixel_values": image, "labels": 0} for image in make_batches(1, batch_size=8)[0]]
    trainer = WidthSearchTrainer(
        model, arguments, make_full_precision(backbone), train_dataset=images, mixtures=mixtures,
        cost=costs["BitOps"], cost_weight=cost_weight, width_learning_rate=0.1,
    )  # fmt: skip
    trainer.train()
    return space, mixtures, costs, trainer


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_dear_cost_narrows_every_width_and_a_free_one_widens_most(backbone, tmp_path):
    space, mixtures, costs, trainer = train(backbone, 100.0, tmp_path)
    assert AllocationProblem(mixtures.losses(), costs).solve() == space.uniform(2, 2)
    logged = [entry["loss_cost"] for entry in trainer.state.log_history if "loss_cost" in entry]
    assert logged[-1] < logged[0]
    space, mixtures, costs, _ = train(backbone, 0.0, tmp_path, steps=20)
    widths = AllocationProblem(mixtures.losses(), costs).solve().values()
    assert sum((width.weight_bits == 4) + (width.activation_bits == 4) for width in widths) > len(widths)


def test_the_logits_have_their_own_learning_rate_and_no_decay(tmp_path):
    _, mixtures, _, trainer = train("vit", 0.0, tmp_path, steps=1, weight_decay=0.1)
    group = trainer.optimizer.param_groups[-1]
    assert {id(p) for p in group["params"]} == {id(p) for p in mixtures.logits()}
    assert (group["initial_lr"], group["weight_decay"]) == (0.1, 0.0)


def test_without_a_budget_the_argmax_is_taken():
    _, space, mixtures = make_mixtures(candidates=(2, 3, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for logits in mixtures.logits():
            logits.copy_(torch.randn(3, generator=generator))
    widths = AllocationProblem(mixtures.losses(), CostModel(config_of("vit"), space)).solve()
    for name, quantizer in space.inputs.items():
        assert widths[name].weight_bits == (2, 3, 4)[mixtures.weights[name].logits.argmax()]
        assert widths[name].activation_bits == (2, 3, 4)[mixtures.inputs[quantizer].logits.argmax()]
