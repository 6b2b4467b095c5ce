"""The latency table: measured, written, read."""

import pytest
import torch
from conftest import IMAGE_SIZE, instruction_sets, make_full_precision, make_quantized
from test_cost import config_of

from quantformer_hf.__main__ import main
from quantformer_hf.checkpoints import load_full_precision
from quantformer_hf.kernels import using
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.latency_table import LatencyKey, LatencyTable
from quantformer_hf.mixed_precision.measure_latency import _on_noise, _packed, measure_latency, packed_linear
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.packed_layers import PackedLinear


HEADER = "rows,in_features,out_features,num_groups,weight_bits,activation_bits,milliseconds\n"


def test_every_shape_is_measured_once_at_every_pair_of_bits():
    table = measure_latency(make_full_precision("vit"), (1, 2, 4), num_groups=4, rounds=2)
    shapes = {(17, 32, 32), (17, 32, 64), (17, 64, 32)}
    assert set(table.times) == {LatencyKey(*s, 4, w, a) for s in shapes for w in (1, 2, 4) for a in (2, 4)}
    assert all(time > 0 for time in table.times.values())
    config = config_of("vit")
    space = SearchSpace.of(config, (1, 2, 4))
    costs = CostModel(config, space, table)
    linears = sum(table.milliseconds(n, *shape_of(costs, n), 4, 2, 4) for n in space.inputs)
    assert costs["ms"].total(space.uniform(2, 4)) == pytest.approx(table.rest + linears)


def shape_of(costs, name):
    kind = name.rpartition(".")[2]
    return costs.products[name].rows, *{"fc1": (32, 64), "fc2": (64, 32)}.get(kind, (32, 32))


def test_the_measured_layer_is_a_packed_one_of_the_shape_and_bits():
    layer = packed_linear(LatencyKey(17, 32, 64, 4, 3, 5))
    assert isinstance(layer, PackedLinear)
    assert (layer.in_features, layer.out_features) == (32, 64)
    assert (layer.weight_quantizer.grid.bits, layer.input_quantizer.grid.bits) == (3, 5)
    assert layer.input_quantizer.scale.numel() == 4
    assert len(layer.input_quantizer.group_index.unique()) == 4


def test_what_is_timed_makes_no_plan_anew():
    layer = packed_linear(LatencyKey(17, 32, 64, 4, 3, 5))
    x = torch.randn(1, 17, 32)
    with torch.inference_mode():
        layer(x)
        plan = layer.plan(layer.channel_plan())
        layer(x)
        assert layer.plan(layer.channel_plan()) is plan


@pytest.mark.parametrize("bits", [(2, 2), (3, 5), (4, 4), (8, 8)])
@pytest.mark.parametrize("instructions", [None, *instruction_sets()])
def test_what_is_timed_gives_what_the_layer_does(bits, instructions):
    key = LatencyKey(17, 32, 64, 4, *bits)
    with torch.inference_mode(), using(instructions):
        torch.manual_seed(0)
        timed = _on_noise(key, "cpu")()
        torch.manual_seed(0)
        layer = packed_linear(key)
        assert torch.equal(timed, layer(torch.randn(1, 17, 32)))


def test_the_command_writes_what_is_read_again(tmp_path, capsys):
    make_full_precision("vit").save_pretrained(tmp_path / "model")
    output = tmp_path / "latency.csv"
    flags = ["--candidate_bits", "2", "--num_groups", "4", "--rounds", "1", "--output", str(output)]
    main(["measure-latency", str(tmp_path / "model"), *flags])
    table = LatencyTable.read(output)
    # Three shapes at W2A2, and at W4A4, at which the whole model is timed.
    assert {(key.weight_bits, key.activation_bits) for key in table.times} == {(2, 2), (4, 4)}
    assert len(table.times) == 6
    assert "everything else in the model" in capsys.readouterr().out


def test_a_table_is_written_to_the_last_digit_that_counts(tmp_path):
    table = LatencyTable({LatencyKey(1, 2, 3, 4, 5, 6): 1.23456}, rest=7.5)
    table.write(tmp_path / "latency.csv")
    read = LatencyTable.read(tmp_path / "latency.csv")
    assert (read.times, read.rest) == (table.times, table.rest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows,milliseconds\nrest,1\n", "lacks the column 'activation_bits'"),
        (HEADER + "17,32,32,4,2,2,fast\n", "line 2, is no measurement"),
        (HEADER + "17,32,32,4,2,2,-1\n", "line 2, is no measurement"),
        (HEADER + "17,32,32,4,2,2,inf\n", "line 2, is no measurement"),
        (HEADER + "17,32,32,4,two,2,1\n", "line 2, is no measurement"),
        (HEADER + "17,32,32,4,2,2,1\n", "no line whose rows is 'rest'"),
        (HEADER + "17,32,32,4,2,2,1\n17,32,32,4,2,2,3\n", "line 3, .*another time for 17 rows"),
        (HEADER + "rest,,,,,,5\nrest,,,,,,1\n", "line 3, .*another time for the rest: keep one"),
        ("\x80\x00", "lacks the column"),
    ],
)
def test_a_wrong_table_is_explained(tmp_path, text, message):
    path = tmp_path / "latency.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LatencyTable.read(path)


def test_a_missing_table_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no latency table nowhere\.csv"):
        LatencyTable.read("nowhere.csv")


def test_a_table_from_a_spreadsheet_is_read(tmp_path):
    path = tmp_path / "latency.csv"
    path.write_text(HEADER + "17,32,32,4,2,2,1\n,,,,,,\nrest,,,,,,2\n", encoding="utf-8-sig")
    table = LatencyTable.read(path)
    assert (list(table.times.values()), table.rest) == ([1.0], 2.0)


def test_what_cannot_be_written_or_measured_is_said_before_anything_is_measured(tmp_path):
    make_full_precision("vit").save_pretrained(tmp_path / "model")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit, match=r"FileExistsError|NotADirectoryError"):
        main(["measure-latency", str(tmp_path / "model"), "--output", str(file / "latency.csv")])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="device is cuda, which torch does not find here"):
            main(["measure-latency", str(tmp_path / "model"), "--device", "cuda"])
    with pytest.raises(SystemExit, match="device is tpu, which torch does not find here"):
        main(["measure-latency", str(tmp_path / "model"), "--device", "tpu"])
    output = tmp_path / "latency.csv"
    with pytest.raises(SystemExit, match="num_groups is 500"):
        main(["measure-latency", str(tmp_path / "model"), "--num_groups", "500", "--output", str(output)])
    # 255 fit into a file, and not into 32 channels.
    with pytest.raises(SystemExit, match="255"):
        main(["measure-latency", str(tmp_path / "model"), "--num_groups", "255", "--output", str(output)])
    assert not output.exists()
    output.write_text("what somebody measured")
    with pytest.raises(SystemExit, match=r"latency\.csv is there already: name another file by --output"):
        main(["measure-latency", str(tmp_path / "model"), "--output", str(output)])
    assert output.read_text() == "what somebody measured"


def test_linears_are_measured_at_the_size_of_the_images_that_are_to_come(tmp_path):
    make_full_precision("vit").save_pretrained(tmp_path / "model")
    output = tmp_path / "latency.csv"
    flags = ["--candidate_bits", "2", "--num_groups", "4", "--rounds", "1", "--image_size", str(2 * IMAGE_SIZE)]
    main(["measure-latency", str(tmp_path / "model"), *flags, "--output", str(output)])
    config = load_full_precision(tmp_path / "model", image_size=2 * IMAGE_SIZE).model.config
    assert (config.image_size // config.patch_size) ** 2 + 1 in {key.rows for key in LatencyTable.read(output).times}


def test_the_whole_model_is_timed_with_its_other_bits(tmp_path, monkeypatch):
    timed = []

    def packed(model, *arguments):
        timed.append((model.config.class_token_bits, model.config.attention_bits))
        return _packed(model, *arguments)

    monkeypatch.setattr("quantformer_hf.mixed_precision.measure_latency._packed", packed)
    make_full_precision("vit").save_pretrained(tmp_path / "model")
    command = ["measure-latency", str(tmp_path / "model"), "--candidate_bits", "2", "--rounds", "1", "--output"]
    main([*command, str(tmp_path / "one.csv"), "--class_token_bits", "8", "--attention_bits", "32"])
    main([*command, str(tmp_path / "two.csv")])
    assert timed == [(8, 32), (None, 8)]


def test_a_quantized_model_has_no_other_widths_to_measure(tmp_path):
    make_quantized("vit", "finetune").pack().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="is quantized already: name the full-precision model"):
        main(["measure-latency", str(tmp_path / "model"), "--output", str(tmp_path / "latency.csv")])
    assert not (tmp_path / "latency.csv").exists()
