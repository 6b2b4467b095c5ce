"""Losses of single choices, what they add up to, and the search under a budget."""

import copy

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized
from test_cost import as_layer_bits, config_of, random_widths

from quantformer_hf import QuantformerForImageClassification, StageError
from quantformer_hf.mixed_precision import candidates
from quantformer_hf.mixed_precision.budget import Budget
from quantformer_hf.mixed_precision.budget_search import BudgetSearch, check_budgets
from quantformer_hf.mixed_precision.candidates import Candidates
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.divergence import Divergence, replayed
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.mixed_precision.sensitivity import measure_sensitivities
from quantformer_hf.paused import PausedRuns, Place
from quantformer_hf.quantize import blocks, full_precision, reading_layers


BATCHES = make_batches(2, batch_size=8)


@pytest.fixture(scope="module", params=["vit", "swin"])
def search(request):
    model = make_quantized(request.param, num_groups=4)
    model.config.num_groups = 4
    space = SearchSpace.of(model.config, (2, 3, 4, 8), (3, 4))
    return BudgetSearch(model, BATCHES, CostModel(model.config, space))


def test_the_estimate_is_near_the_divergence_for_small_errors(search):
    # At eight bits the second order is all there is; single draws of the classes leave noise.
    estimated, measured = 0.0, 0.0
    for name in search.space.inputs:
        estimated += search.losses.weights[name][4]
        measured += search.divergence.of({name: 4}, {})[0]
    assert estimated == pytest.approx(measured, rel=0.5)
    estimated, measured = 0.0, 0.0
    for name in search.space.quantizers:
        estimated += search.losses.inputs[name][4]
        measured += search.divergence.of({}, {name: 4})[0]
    assert estimated == pytest.approx(measured, rel=0.5)
    estimated, measured = 0.0, 0.0
    for name in search.space.attention:
        estimated += search.losses.attention[name][4]
        measured += search.divergence.of({}, {}, {name: 4})[0]
        assert search.losses.attention[name][3] > search.losses.attention[name][8] > 0
    assert estimated == pytest.approx(measured, rel=0.5)


def test_a_replayed_start_changes_no_divergence(search):
    name = [n for n in search.space.inputs if search.divergence._unit_of(n) > 0][-1]
    quantizer = search.space.inputs[name]
    found = search.divergence.of({name: 2}, {quantizer: 2})
    whole = copy.copy(search.divergence)
    whole._unit_of = lambda name: 0
    assert whole.of({name: 2}, {quantizer: 2}) == pytest.approx(found, rel=1e-6)


def test_nothing_of_the_model_is_changed():
    model = make_quantized("vit").train()
    model.config.num_groups = 4
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    search = BudgetSearch(model, BATCHES, CostModel(model.config, SearchSpace.of(model.config, (2, 4), (3,))))
    search.point(search.space.uniform(2, 2))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [id(module) for module in model.modules()]
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(module.training for module in model.modules())


def test_everything_put_in_is_the_quantized_model_itself():
    """With all layers at some widths, the divergence is that of a model that was quantized to them."""
    config = config_of("vit")
    space = SearchSpace.of(config, (3, 8))
    widths = random_widths(space, 3)
    arguments = {"attention_bits": None, "embedding_bits": 32, "classifier_bits": 32, "weight_quantizer": "minmax"}
    # Centring looks at the grids, which differ between the two models.
    model, quantized = (
        QuantformerForImageClassification.from_full_precision(
            make_full_precision("vit"), num_groups=4, layer_bits=layer_bits, **arguments
        ).calibrate(make_batches(), centre_channels=False)
        for layer_bits in (None, as_layer_bits(widths))
    )
    quantized.begin_search().freeze_groups().eval()
    divergence = Divergence(model, Candidates.of(model, space, BATCHES), space, BATCHES)
    found, kept = divergence.of_widths(widths)
    with torch.no_grad():
        student = torch.cat([quantized(batch).logits for batch in BATCHES])
        with full_precision(model):
            teacher = torch.cat([model(batch).logits for batch in BATCHES])
    expected = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found == pytest.approx(expected.item(), rel=1e-3)
    assert kept == (student.argmax(1) == teacher.argmax(1)).float().mean().item()


def test_what_has_no_classes_to_lose_is_refused():
    model = make_quantized("vit")
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(
        ValueError, match="problem_type multi_label_classification, has none: choose layer_bits by hand"
    ):
        BudgetSearch(model, make_batches(1), CostModel(model.config, SearchSpace.of(model.config)))


def test_replayed_units_do_not_run():
    model = make_full_precision("vit")
    units = blocks(model)
    output = torch.zeros(8, 17, 32)
    with torch.no_grad(), replayed(units, [output, output]):
        logits = model(BATCHES[0]).logits
    assert torch.equal(logits, logits[:1].expand_as(logits))
    with torch.no_grad():
        assert not torch.equal(model(BATCHES[0]).logits[0], model(BATCHES[0]).logits[1])


@pytest.mark.parametrize("unit", ["BitOps", "bytes"])
def test_a_layer_that_matters_more_gets_the_bits(search, unit):
    losses = search.losses
    name = list(search.space.inputs)[2]
    before = losses.weights[name]
    try:
        losses.weights[name] = {bits: 1e3 / 4**bits for bits in search.space.weight_bits}
        most = search.costs[unit].total(search.space.uniform(3, 3))
        assert search.solve([Budget(unit, most)])[name].weight_bits == 8
        losses.weights[name] = dict.fromkeys(search.space.weight_bits, 0.0)
        # Nothing is gained by bits here, and they are wanted elsewhere.
        assert search.solve([Budget(unit, most)])[name].weight_bits == 2
    finally:
        losses.weights[name] = before


def test_the_front_falls_and_each_point_is_within_its_cost(search):
    front = search.front("BitOps", points=5)
    predicted = [point.predicted for point in front]
    assert predicted == sorted(predicted, reverse=True)
    costs = [point.cost["BitOps"] for point in front]
    assert costs == sorted(costs)
    # At equal cost never worse than uniform bits, by what is predicted.
    for uniform in search.uniform():
        best = search.solve([Budget("BitOps", uniform.cost["BitOps"])])
        assert search.losses.total(search.space, best) <= uniform.predicted * (1 + 1e-9)


def test_refinement_keeps_the_budget_and_is_no_worse(search):
    pytest.importorskip("optuna")
    budget = Budget("BitOps", search.costs["BitOps"].total(search.space.uniform(3, 3)))
    plain, refined = search.solve([budget]), search.solve([budget], trials=6)
    assert search.costs["BitOps"].total(refined) <= budget.most
    assert search.divergence.of_widths(refined)[0] <= search.divergence.of_widths(plain)[0]


def test_a_refinement_begins_with_the_best_by_prediction_and_its_seed_decides_on_the_others(search, monkeypatch):
    pytest.importorskip("optuna")
    from quantformer_hf.mixed_precision import refine

    budget, tried = Budget("BitOps", search.costs["BitOps"].total(search.space.uniform(3, 3))), {}

    def evaluate(widths, of):
        tried.setdefault(of, []).append(widths)
        return len(tried[of])

    for of, seed in (("one", 0), ("same", 0), ("other", 1)):
        found = refine.refine(search.losses, search.costs, [budget], lambda w, of=of: evaluate(w, of), 6, seed)
        assert found == tried[of][0] == search.solve([budget])
    assert tried["one"] == tried["same"] != tried["other"]
    monkeypatch.setattr(refine, "refine", lambda *given: given)
    assert search.solve([budget], trials=3, seed=7)[-2:] == (3, 7)


def test_a_budget_that_cannot_be_kept_is_known_before_anything_is_measured():
    config = config_of("vit")
    with pytest.raises(ValueError, match="below the smallest possible cost"):
        check_budgets(CostModel(config, SearchSpace.of(config)), [Budget("bytes", 1000)])


def test_the_search_needs_a_calibrated_model():
    model = make_quantized("vit", "finetune")
    costs = CostModel(model.config, SearchSpace.of(model.config))
    with pytest.raises(StageError, match="needs a model in the stage 'pretrain'"):
        BudgetSearch(model, BATCHES, costs)


def test_losses_of_one_bit_weights_are_measured(search):
    model = search.divergence.model
    space = SearchSpace.of(model.config, (1, 4))
    rounded = Candidates.of(model, space, BATCHES)
    losses = measure_sensitivities(model, rounded, space, BATCHES)
    assert sum(row[1] for row in losses.weights.values()) > sum(row[4] for row in losses.weights.values())
    assert measure_sensitivities(model, rounded, space, BATCHES) == losses


def test_weights_are_rounded_for_the_tokens_that_count(monkeypatch):
    model, given = make_quantized("vit"), {}
    space, readers = SearchSpace.of(model.config, (4,)), reading_layers(model)
    rows = torch.arange(8 * 17) % 17 == 0
    monkeypatch.setattr(candidates, "token_weights", lambda *_: ([dict.fromkeys(readers, rows.float())], None))
    monkeypatch.setattr(candidates, "refit_layer", lambda _, found: given.setdefault(id(found.moments), found))
    Candidates.of(model, space, BATCHES[:1])
    with torch.no_grad(), full_precision(model), PausedRuns(model, BATCHES[:1], map(Place, readers)) as runs:
        for evidence in given.values():
            (quantizer, _), (x,) = runs.go_on()
            mean = quantizer.produce(x).flatten(0, 1)[rows].double().mean(0)
            torch.testing.assert_close(evidence.moments.mean, mean, rtol=1e-4, atol=1e-5)
