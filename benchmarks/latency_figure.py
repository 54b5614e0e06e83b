"""A latency table as a picture: what each kind of kernel costs against its channels, the stairs."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgeprune.pruning.latency import KindCosts, LatencyTable, LayerUse

COLUMNS = 3
COLORS = ("#0b5394", "#3d85c6", "#9fc5e8", "#b7b7b7")  # from the most in channels to the fewest
UNALIGNED, NETWORK = "#cc4125", "#38761d"


def draw_stairs(table: LatencyTable, uses: Sequence[LayerUse] = ()) -> Figure:
    """One panel a kind; `uses` are the kernels of a network, marked where they lie."""
    rows = math.ceil(len(table.kinds) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.1 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel, costs in zip(panels, table.kinds, strict=False):
        own = sorted({(u.in_channels, u.out_channels) for u in uses if u.kind == costs.kind})
        _draw_kind(panel, table, costs, own)
    for panel in panels[len(table.kinds) :]:
        panel.set_axis_off()
    figure.suptitle(
        f"{table.device}, {table.backend} {table.backend_version}, {table.precision}: "
        "what a kernel of a network costs"
    )
    return figure


def _draw_kind(panel: Axes, table: LatencyTable, costs: KindCosts, own: Sequence[tuple[int, int]]) -> None:
    kind = costs.kind
    most = costs.aligned.out_channels[-1]
    counts = list(range(1, most + 1))
    for color, in_channels in zip(COLORS, reversed(costs.aligned.in_channels), strict=False):
        label = None if kind.one_axis else f"{in_channels} in"
        ms = [table.cost_ms(kind, count if kind.one_axis else in_channels, count) for count in counts]
        if costs.outputs.alignment > 1:
            # off the alignment the cost jumps up and down from count to count: the stairs alone are a line
            ms = [
                table.cost_ms(kind, above if kind.one_axis else in_channels, above)
                for above in (min(costs.outputs.above(count), most) for count in counts)
            ]
        panel.plot(counts, ms, color=color, label=label, drawstyle="steps-pre")
    if costs.unaligned is not None:
        surface = costs.unaligned
        factor = table.scale * table.correction
        label = "off the alignment" if kind.one_axis else f"{surface.in_channels[-1]} in: off the alignment"
        panel.plot(
            surface.out_channels,
            [factor * ms for ms in surface.ms[-1]],
            color=UNALIGNED,
            linestyle="--",
            marker="o",
            markersize=3,
            label=label,
        )
    if own:
        panel.plot(
            [out_channels for _, out_channels in own],
            [table.cost_ms(kind, *each) for each in own],
            linestyle="none",
            marker="D",
            markersize=6,
            markerfacecolor="none",
            color=NETWORK,
            label="this network",
        )
    panel.set_title(f"{kind}\n{_steps(costs)}", fontsize=9)
    panel.set_xlim(0, most * 1.03)
    panel.set_ylim(bottom=0)
    panel.tick_params(labelsize=8)
    panel.set_xlabel("channels" if kind.one_axis else "out channels", fontsize=8)
    panel.set_ylabel("ms", fontsize=8)
    panel.legend(fontsize=7, frameon=False)


def _steps(costs: KindCosts) -> str:
    sides = {"in": costs.inputs, "out": costs.outputs}
    words = []
    for side, stairs in sides.items():
        if stairs.step > 1:
            aligned = f" (aligned: {stairs.alignment})" if stairs.alignment > 1 else ""
            words.append(f"{side}: steps of {stairs.step}{aligned}")
    return ", ".join(words) or "no steps"
