"""Benchmarks keep what they have measured, and do not take it for something else."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
from _arguments import positive, shared_folder
from _kept import by_name, keep_told, refuse_other
from _machine import peak_extra_bytes


def test_the_last_of_a_flag_counts_and_places_do_not():
    flags = ["--stages", "search", "finetune", "--aux_weight", "1", "--output_dir", "x", "--aux_weight", "0", "--plain"]
    assert by_name(flags) == {"--stages": "search finetune", "--aux_weight": "0", "--plain": ""}


def test_a_result_is_not_taken_for_that_of_other_flags(tmp_path):
    result = tmp_path / "row" / "measured.json"
    keep_told(result, {"--batch_size": "16"})
    # Nothing was finished.
    refuse_other(result, {"--batch_size": "32"})
    result.write_text("{}")
    refuse_other(result, {"--batch_size": "16"})
    with pytest.raises(
        SystemExit, match=r"row was made with --batch_size 16, and not with --batch_size 32: .*--output_dir"
    ):
        refuse_other(result, {"--batch_size": "32"})
    with pytest.raises(SystemExit, match=r"without --seed, and not with --seed 0"):
        refuse_other(result, {"--batch_size": "16", "--seed": "0"})


def test_an_older_result_that_does_not_say_is_taken_as_it_is(tmp_path):
    (tmp_path / "measured.json").write_text("{}")
    refuse_other(tmp_path / "measured.json", {"--batch_size": "32"})


def test_a_link_leads_where_it_is_told_last(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
        folder = accuracy.link(tmp_path / "data", {"train.parquet": tmp_path / name})
        assert (folder / "train.parquet").read_text() == name


def test_the_table_has_wide_rows_and_those_that_were_renamed(tmp_path):
    measured = {
        "accuracy": 1,
        "full_precision": 2,
        "agreement": 3,
        "divergence": 4,
        "levels": [8, 8],
        "groups_in_use": 1,
    }
    measured |= {"bit_operations": 1e9, "full_precision_bit_operations": 2e9}
    for name in ("renamed_row_w32a32_seed0", "ours_w32a32_seed0", "ours_w4a4_seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measured.json").write_text(json.dumps(measured))
    names = [line.split("  ")[0].strip("| ") for line in accuracy.table(tmp_path).splitlines()]
    names = [name for name in names if name.startswith("W")]
    assert names == ["W32A32 ours", "W32A32 renamed_row", "W4A4 ours"]


def test_bad_values_are_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="0 is too few"):
        positive("0")
    with pytest.raises(argparse.ArgumentTypeError, match="has no folder data"):
        shared_folder(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sampled on Linux")
def test_the_memory_of_a_cpu_is_measured_where_there_is_a_gpu_as_well(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def take():
        taken = torch.ones(2**24)
        time.sleep(0.1)
        del taken

    assert peak_extra_bytes(take, "cpu") > 2**25
