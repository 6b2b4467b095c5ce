"""Times of packed linears by shape and bits, as a CSV file: measured here, or on any other machine by any means."""

import csv
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


#: In the column `rows`: the time of one image outside the linears of the blocks.
REST = "rest"


@dataclass(frozen=True)
class LatencyKey:
    """What the time of a linear depends on.

    Attributes:
        rows: positions of one image that the weight is applied to.
        in_features, out_features: of the weight.
        num_groups: of its input's quantizer.
        weight_bits, activation_bits: of weight and input.
    """

    rows: int
    in_features: int
    out_features: int
    num_groups: int
    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.in_features} to {self.out_features} channels, {self.num_groups} groups,"
            f" W{self.weight_bits}A{self.activation_bits}"
        )


KEY_COLUMNS = tuple(f.name for f in dataclasses.fields(LatencyKey))
TIME_COLUMN = "milliseconds"


@dataclass
class LatencyTable:
    """Milliseconds of one image.

    Attributes:
        times: of each linear.
        rest: of everything else in the model.
        source: the file, for messages.
    """

    times: dict[LatencyKey, float] = field(default_factory=dict)
    rest: float = 0.0
    source: str = "the latency table"

    def milliseconds(self, layer: str, *key: int) -> float:
        """The time of a linear; `key` has the fields of `LatencyKey`.

        Raises:
            ValueError: it is not there.
        """
        key = LatencyKey(*key)
        if key not in self.times:
            raise ValueError(
                f"{self.source} has no time for {key} (layer '{layer}'): measure it by"
                f" `python -m quantformer_hf measure-latency` with these candidates and groups, or add the line"
            )
        return self.times[key]

    def write(self, path: str | Path) -> None:
        """Write the CSV file."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*KEY_COLUMNS, TIME_COLUMN])
            for key, time in self.times.items():
                writer.writerow([*dataclasses.astuple(key), f"{time:.6g}"])
            writer.writerow([REST, *[""] * (len(KEY_COLUMNS) - 1), f"{self.rest:.6g}"])

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a CSV file with the columns of `LatencyKey` and `milliseconds`, and a line whose `rows` is `rest`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a column or the line `rest` is missing, something is no number, a time is negative, or a linear or
                the rest has two of them.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no latency table {path}: make one by measure-latency")
        table, rest = cls(source=str(path)), None
        # With the mark that Excel puts first.
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            missing = {*KEY_COLUMNS, TIME_COLUMN} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{path} lacks the column {min(missing)!r}: it needs {', '.join(KEY_COLUMNS)}, {TIME_COLUMN}"
                )
            for number, row in enumerate(reader, start=2):
                if not any(row.values()):
                    continue
                try:
                    time = float(row[TIME_COLUMN])
                    if not 0 <= time < float("inf"):
                        raise ValueError(f"the time {time}")
                    if row["rows"] == REST:
                        if rest not in (None, time):
                            raise ValueError("another time for the rest: keep one of them")
                        rest = time
                        continue
                    key = LatencyKey(*(int(row[column]) for column in KEY_COLUMNS))
                    if table.times.setdefault(key, time) != time:
                        raise ValueError(f"another time for {key}: keep one of them")
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}, is no measurement ({error}): {dict(row)}") from error
        if rest is None:
            raise ValueError(
                f"{path} has no line whose rows is {REST!r}, the time of one image outside the linears: add it, 0 if only"
                f" linears are to count"
            )
        table.rest = rest
        return table
