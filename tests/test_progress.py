"""Bars of what takes minutes."""

import pytest
from conftest import make_batches, make_full_precision
from transformers.utils import logging

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.progress import progress


def test_items_pass_and_the_bar_has_a_name(capfd):
    assert list(progress(iter("abc"), "Counting", total=3)) == ["a", "b", "c"]
    said = capfd.readouterr().err
    assert "Counting" in said
    assert "3/3" in said


def test_one_process_of_a_machine_has_a_bar(capfd, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(progress("abc", "Counting")) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""


@pytest.fixture
def without_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def test_they_are_turned_off_as_those_of_transformers(without_bars, capfd):
    assert list(progress("abc", "Counting")) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""


def test_what_takes_minutes_has_bars(capfd):
    model = QuantformerForImageClassification.from_full_precision(make_full_precision())
    model.calibrate(make_batches()).begin_search(4).freeze_groups().reconstruct(make_batches())
    said = capfd.readouterr().err
    for name in ("Calibrating, batches", "Weighing tokens, batches", "Refitting, inputs of layers"):
        assert f"{name}: " in said
    # Two inputs of linears in each of attention and MLP.
    assert "8/8" in said
