"""Runs that wait for each other."""

import gc

import greenlet
import pytest
import torch
from conftest import make_batches, make_quantized

from quantformer_hf.kernels import fake_quantized, in_integers
from quantformer_hf.paused import PausedRuns, Place
from quantformer_hf.quantize import blocks


def test_runs_stop_in_step_where_they_are_told_to_and_see_what_one_run_sees(backbone):
    model, batches = make_quantized(backbone), make_batches(3)
    first, *_, last = blocks(model)
    seen = []

    def look(_, __, put_out):
        seen.append(put_out[0] if isinstance(put_out, tuple) else put_out)

    handles = [
        first.register_forward_pre_hook(lambda _, given: seen.append(given[0])),
        first.register_forward_hook(look),
        last.register_forward_pre_hook(lambda _, given: seen.append(given[0])),
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), PausedRuns(model, batches, [Place(first), Place(last)], [Place(first, output=True)]) as runs:
        for stop, place in enumerate((Place(first), Place(last))):
            reached, tensors = runs.go_on()
            assert reached == place
            assert all(torch.equal(*pair) for pair in zip(tensors, seen[2 * stop :: 3], strict=True))
            assert all(len(watched) == stop for watched in runs.seen)
        assert all(
            torch.equal(watched[Place(first, output=True)], tensor)
            for watched, tensor in zip(runs.seen, seen[1::3], strict=True)
        )
        with pytest.raises(RuntimeError, match="run to its end: there is no other stop"):
            runs.go_on()


class Twice(torch.nn.Module):
    """Whose layer runs a second time on what it has put out."""

    def __init__(self):
        super().__init__()
        self.layer, self.told = torch.nn.Identity(), []

    def forward(self, pixel_values, **told):
        self.told.append(told)
        self.layer(self.layer(pixel_values) + 1)


def test_a_place_that_is_passed_twice_tells_what_it_was_last_and_nothing_else_is_asked_for():
    model, batch = Twice(), torch.zeros(1)
    place = Place(model.layer, output=True)
    with PausedRuns(model, [batch], [Place(model.layer)], [place]) as runs:
        assert [runs.go_on()[1][0].item() for _ in range(2)] == [0, 1]
        assert runs.seen[0][place].item() == 0
        with pytest.raises(RuntimeError, match="run to its end"):
            runs.go_on()
        assert runs.seen[0][place].item() == 1
    assert model.told == [{"output_hidden_states": False, "output_attentions": False}]


def test_what_changes_at_a_stop_counts_for_all_that_comes_after():
    model, batches = make_quantized(), make_batches(2)
    head = model.backbone.classifier
    with torch.no_grad(), PausedRuns(model, batches, [Place(head), Place(head, output=True)]) as runs:
        runs.go_on()
        head.bias += 100
        _, logits = runs.go_on()
    assert all((of_batch > 50).all() for of_batch in logits)


def test_other_runs_do_not_stop():
    model, batches = make_quantized(), make_batches(2)
    inside = Place(blocks(model)[1])
    with torch.no_grad():
        expected = model(batches[0]).logits
        with PausedRuns(model, batches, [inside]) as runs, PausedRuns(model, batches[:1], [inside]) as others:
            assert len(runs.go_on()[1]) == 2
            assert torch.equal(model(batches[0]).logits, expected)
            assert len(others.go_on()[1]) == 1
    assert not inside.module._forward_pre_hooks


def test_modes_are_those_of_the_caller_and_nothing_is_left_whatever_happens():
    model, batches = make_quantized(), make_batches(2)
    inside, modes = blocks(model)[1], []
    handle = inside.register_forward_pre_hook(lambda *_: modes.append((torch.is_grad_enabled(), in_integers())))

    def fail():
        with torch.no_grad(), fake_quantized(), PausedRuns(model, batches, [Place(inside)]) as runs:
            runs.go_on()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    handle.remove()
    assert modes == [(False, False)] * 2
    runs = [found for found in gc.get_objects() if type(found) is greenlet.greenlet and found.parent is not None]
    assert all(run.dead for run in runs)
    assert torch.is_grad_enabled()
    assert in_integers()
    assert not inside._forward_pre_hooks
