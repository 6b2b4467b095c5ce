"""Two pictures beside an allocation: the bits of each layer, and what is lost at which cost."""

from pathlib import Path

from matplotlib.figure import Figure

from .budget import BIT_OPERATIONS, BYTES
from .budget_search import FrontPoint
from .search_space import Widths


#: Names of the files.
BITS_PICTURE, FRONT_PICTURE = "bit_allocation.png", "front.png"

#: What an axis counts, and in what.
AXES = {BYTES: ("size of the packed file, MB", 1e6), BIT_OPERATIONS: ("effort, GBitOps", 1e9)}


def draw_bits(widths: Widths, path: str | Path) -> None:
    """Write a picture of the bits of each layer's weight and input, in the order of the network, then of attention."""
    figure = Figure(figsize=(max(6.0, 0.16 * len(widths)), 4.5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    kinds = sorted({name.rpartition(".")[2] for name in widths})
    for axis, what in zip(axes, ("weight_bits", "activation_bits"), strict=True):
        for number, kind in enumerate(kinds):
            if kind == "attention" and what == "weight_bits":
                # Its products have no weight.
                continue
            at = [i for i, name in enumerate(widths) if name.endswith(f".{kind}")]
            heights = [getattr(list(widths.values())[i], what) for i in at]
            axis.bar(at, heights, color=f"C{number}", label=kind)
        axis.set_ylabel(f"{what.removesuffix('_bits')} bits")
        axis.set_yticks(range(0, 9, 2))
    every_kind = axes[1].get_legend_handles_labels()
    axes[0].legend(*every_kind, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False)
    axes[1].set_xlabel("layer, in the order of the network")
    figure.savefig(path, dpi=150)


def draw_front(
    front: list[FrontPoint], uniform: list[FrontPoint], chosen: FrontPoint, unit: str, path: str | Path
) -> None:
    """Write a picture of the classes kept and of the divergence from full precision over the cost in `unit`."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    label, scale = AXES.get(unit, ("time of one image, ms", 1.0))
    axes = figure.subplots(1, 2)
    for axis, what in zip(axes, (lambda p: 100 * p.agreement, lambda p: p.divergence), strict=True):

        def over(points: list[FrontPoint], *style: str, axis=axis, what=what, **more) -> None:
            axis.plot([p.cost[unit] / scale for p in points], [what(p) for p in points], *style, **more)

        over(front, "o-", label="best by layer")
        over(uniform, "s--", label="the same bits everywhere")
        over([chosen], "*", markersize=14, label="chosen")
        for point in uniform:
            axis.annotate(
                point.label, (point.cost[unit] / scale, what(point)), textcoords="offset points", xytext=(5, -12)
            )
        axis.set_xlabel(label)
        axis.legend()
    axes[0].set_ylabel("calibration images that keep their class, %")
    axes[1].set_ylabel("KL divergence from full precision, nats")
    axes[1].set_yscale("log")
    figure.savefig(path, dpi=150)
