"""The plots of a report: runs in, matplotlib figures out. Colours are Okabe and Ito's, told apart by all readers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hope_train.report.runs import Run, eval_label, figure_name, is_partial, is_wikitext
from hope_train.report.summary import PUBLISHED, PUBLISHED_SIZE, best_word_ppl, plain_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))
MARKERS = "osD^vP"
REFERENCES = ("Transformer++", "Hope")
"""The published figures drawn as lines: the baseline and the goal; the others stand in the page's table."""

MOST_POINTS = 3000
"""A longer series is thinned to about this many points: a screen shows no more."""


def draw_all(runs: Sequence[Run]) -> dict[str, Figure]:
    """File stem -> figure, for every plot that the runs have data for."""
    figures: dict[str, Figure] = {}
    makers: list[tuple[str, Callable[[Sequence[Run]], Figure | None]]] = [
        ("loss", loss_figure),
        ("word_ppl", word_ppl_figure),
        ("throughput", throughput_figure),
        ("learning_rate", learning_rate_figure),
    ]
    for stem, maker in makers:
        figure = maker(runs)
        if figure is not None:
            figures[stem] = figure
    for number, run in enumerate(runs):
        figure = levels_figure(run)
        if figure is not None:
            figures["levels" if len(runs) == 1 else f"levels_{number + 1}"] = figure
    return figures


def loss_figure(runs: Sequence[Run]) -> Figure | None:
    """Training loss, raw and smoothed, and validation loss where it was measured, against tokens."""
    figure, (axes,) = _figure(1)
    low, high = [], []
    for number, run in enumerate(runs):
        tokens, losses = run.series("loss")
        if not losses:
            continue
        colour, style = _run_style(number)
        smooth = smoothed(losses)
        axes.plot(*_thin(tokens, losses), color=colour, alpha=0.3, linewidth=0.7)
        axes.plot(*_thin(tokens, smooth), color=colour, linestyle=style, linewidth=1.8, label=f"{run.name}: training")
        low.append(min(smooth))
        high.append(max(smooth))
        for label, rows in run.eval_series("validation_loss").items():
            x, y = [row["tokens"] for row in rows], [row["validation_loss"] for row in rows]
            several = len(run.eval_series("validation_loss")) > 1
            name = f"{run.name}: validation" + (f" ({label})" if several else "")
            hollow: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.4}
            axes.plot(x, y, MARKERS[number % len(MARKERS)], color=colour, label=name, **hollow)
            low.append(min(y))
            high.append(max(y))
    if not low:
        return None
    margin = 0.06 * (max(high) - min(low)) + 0.02
    axes.set_ylim(min(low) - margin, max(high) + margin)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Training and validation loss")
    _finish(axes, runs)
    return figure


def word_ppl_figure(runs: Sequence[Run]) -> Figure | None:
    """word_ppl against tokens, log axis; published figures as lines where the text is WikiText.

    Filled markers are complete evaluations, hollow ones cover a part of the pages; a star is the test split.
    """
    figure, (axes,) = _figure(1)
    values: list[float] = []
    on_wikitext = False
    ends: list[tuple[float, float, str]] = []
    for number, run in enumerate(runs):
        colour, style = _run_style(number)
        best = best_word_ppl(run)
        for index, (label, rows) in enumerate(run.eval_series("word_ppl").items()):
            x, y = [row["tokens"] for row in rows], [row["word_ppl"] for row in rows]
            test = rows[0].get("split") == "test"
            partial = is_partial(rows[0])
            axes.plot(
                x,
                y,
                marker="*" if test else MARKERS[index % len(MARKERS)],
                markersize=13 if test else 5,
                markerfacecolor="white" if partial else colour,
                markeredgecolor="black" if test else colour,
                color=colour,
                linestyle=style,
                linewidth=1.5,
                zorder=4 if test else 3,
                label=f"{run.name}: {label}",
            )
            values += y
            on_wikitext = on_wikitext or is_wikitext(rows[0])
            if best is not None and eval_label(best) == label:
                ends.append((y[-1], x[-1], colour))
    if not values:
        return None
    for rank, (value, at, colour) in enumerate(sorted(ends)):
        below = rank == 0 and len(ends) > 1  # the lowest end is labelled below, so that two close ones do not collide
        axes.annotate(
            plain_number(float(value)),
            (at, value),
            xytext=(0, -9 if below else 9),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8.5,
            color=colour,
        )
    published = {name: word for name, word, *_ in PUBLISHED if name in REFERENCES}
    axes.set_yscale("log")
    if on_wikitext:
        for name, word in published.items():
            axes.axhline(word, color="0.35", linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
            above = word == max(published.values())
            axes.annotate(
                f"{name} {word:.2f} (published, {PUBLISHED_SIZE})",
                (0.01, word),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3 if above else -3),
                textcoords="offset points",
                va="bottom" if above else "top",
                fontsize=8,
                color="0.3",
            )
        values += [*published.values()]
    margin = max(1.35, (max(values) / min(values)) ** 0.07)  # for the labels of the lowest and the highest line
    axes.set_ylim(min(values) / margin, max(values) * margin)
    _plain_log_ticks(axes)
    names = {figure_name(row) for run in runs for rows in run.eval_series("word_ppl").values() for row in rows}
    axes.set_ylabel(f"{' / '.join(sorted(names, key=len))} (log)")
    axes.set_title("WikiText perplexity per word" if on_wikitext else "Perplexity per word (not WikiText)")
    _finish(axes, runs, legend="upper right")
    axes.margins(x=0.06)
    return figure


def throughput_figure(runs: Sequence[Run]) -> Figure | None:
    """Tokens per second and peak memory against tokens."""
    figure, (speed, memory) = _figure(2)
    drawn = 0
    for number, run in enumerate(runs):
        colour, style = _run_style(number)
        tokens, values = run.series("tokens_per_s")
        if values:
            speed.plot(*_thin(tokens, values), color=colour, alpha=0.3, linewidth=0.7)
            speed.plot(*_thin(tokens, smoothed(values)), color=colour, linestyle=style, linewidth=1.8, label=run.name)
        tokens_m, values_m = run.series("peak_memory_bytes")
        gib = [value / 2**30 for value in values_m]
        if gib:
            memory.plot(*_thin(tokens_m, gib), color=colour, linestyle=style, linewidth=1.8, label=run.name)
        drawn += bool(values) + bool(gib)
    if not drawn:
        return None
    speed.set(ylabel="tokens per second", title="Throughput")
    memory.set(ylabel="peak memory (GiB)", title="Memory")
    for axes in (speed, memory):
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        _finish(axes, runs, legend="lower right")
    return figure


def learning_rate_figure(runs: Sequence[Run]) -> Figure | None:
    """Learning rate of the core and gradient norm against tokens."""
    figure, (rate, norm) = _figure(2)
    drawn = 0
    for number, run in enumerate(runs):
        colour, style = _run_style(number)
        tokens, values = run.series("lr")
        rate.plot(*_thin(tokens, values), color=colour, linestyle=style, linewidth=1.8, label=run.name)
        tokens_n, norms = run.series("grad_norm")
        positive = [(x, y) for x, y in zip(tokens_n, norms, strict=True) if y > 0]
        if positive:
            x, y = [point[0] for point in positive], [point[1] for point in positive]
            norm.plot(*_thin(x, y), color=colour, alpha=0.3, linewidth=0.7)
            norm.plot(*_thin(x, smoothed(y)), color=colour, linestyle=style, linewidth=1.8, label=run.name)
            norm.set_yscale("log")
        drawn += bool(values) + bool(positive)
    if not drawn:
        return None
    rate.set(ylabel="learning rate", title="Learning rate")
    rate.set_ylim(bottom=0)
    norm.set(ylabel="gradient norm before clipping (log)", title="Gradient norm")
    _plain_log_ticks(norm)
    for axes in (rate, norm):
        _finish(axes, runs, legend="upper right")
    return figure


def levels_figure(run: Run) -> Figure | None:
    """What each level did: size of its updates over its OWN updates, how many it made, its gradient norm."""
    names = run.level_names()
    if not names:
        return None
    figure, (ratio, made, norm) = _figure(3)
    colours = _level_colours(names)
    for index, name in enumerate(names):
        rows = run.level_rows(name)
        if not rows:
            continue
        period = rows[-1].get("period", 1)
        label = name if name == "core" else f"level {name} (period {period})"
        style: dict[str, Any] = {"color": colours[name], "linewidth": 1.5, "label": label}
        style |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
        for axes, key, across in ((ratio, "update_ratio", "updates"), (norm, "grad_norm", "tokens")):
            shown = rows if key == "update_ratio" else run.level_rows(name, due_only=False)
            points = [(r[across], r[key]) for r in shown if _positive(r.get(key)) and _positive(r.get(across))]
            if points:
                x, y = [point[0] for point in points], [point[1] for point in points]
                axes.plot(*_thin(x, smoothed(y, 0.05)), markevery=_every(x), **style)
                axes.set_yscale("log")
        x, y = [row["tokens"] for row in rows if "updates" in row], [row["updates"] for row in rows if "updates" in row]
        if y:
            made.plot(*_thin(x, y), markevery=_every(x), **style)
    ratio.set(title="Size of an update", xlabel="the level's own updates", ylabel="update norm / weight norm (log)")
    ratio.set_xscale("log")
    made.set(title="Updates made", ylabel="updates (log)")
    made.set_yscale("symlog", linthresh=1)
    made.set_ylim(bottom=0)
    norm.set(title="Gradient norm", ylabel="norm of one step's gradient (log)")
    _finish(ratio, [run], legend=None, tokens=False)
    for axes in (made, norm):
        _finish(axes, [run], legend=None)
    for axes in (ratio, norm):
        if axes.get_yscale() == "log":
            _plain_log_ticks(axes)
    _plain_ticks(ratio.xaxis)
    _plain_ticks(made.yaxis)
    handles, labels = made.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(f"Levels of {run.name}", fontsize=12)
    return figure


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Centred mean over `share` of the series (at least 5 points), narrower at both ends: it does not lag behind."""
    reach = max(2, round(share * len(values) / 2))
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + side + 1] - sums[index - side]) / (2 * side + 1))
    return result


def _every(points: Sequence[float]) -> int | float:
    """Markers on every point of a short series, ten over the length of a long one."""
    return 1 if len(points) <= 40 else 0.1


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Every n-th point, the last one always."""
    stride = max(1, len(x) // MOST_POINTS)
    keep = list(range(0, len(x), stride))
    if keep and keep[-1] != len(x) - 1:
        keep.append(len(x) - 1)
    return [x[index] for index in keep], [y[index] for index in keep]


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of its own (no pyplot: nothing global, no window)."""
    from matplotlib.figure import Figure as MatplotlibFigure

    size = {1: (8.6, 4.9), 2: (11.0, 4.2), 3: (13.5, 4.6)}[panels]
    figure = MatplotlibFigure(figsize=size, dpi=130, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _run_style(number: int) -> tuple[str, Any]:
    return RUN_COLOURS[number % len(RUN_COLOURS)], LINE_STYLES[number % len(LINE_STYLES)]


def _level_colours(names: Sequence[str]) -> dict[str, str]:
    """The core in grey; levels from light to dark as they get slower (viridis keeps its order in grey, too)."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    levels = [name for name in names if name != "core"]
    steps = [0.88 * (1 - index / max(1, len(levels) - 1)) for index in range(len(levels))]
    return {"core": "0.55"} | {name: to_hex(colormaps["viridis"](at)) for name, at in zip(levels, steps, strict=True)}


def _finish(axes: Axes, runs: Sequence[Run], legend: str | None = "best", tokens: bool = True) -> None:
    """What every panel shares: a light grid, no box, tokens with k/M/B on the axis, a legend where it helps."""
    from matplotlib.ticker import EngFormatter

    if tokens:
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(11)
    handles, labels = axes.get_legend_handles_labels()
    if legend and handles and (len(labels) > 1 or len(runs) > 1):
        axes.legend(loc=legend, fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="0.85")


def _plain_log_ticks(axes: Axes) -> None:
    """1, 2, 5 on a log axis instead of powers only, so that a narrow range still has labels; no 10^x notation."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    narrow = high / max(low, 1e-30) < 1e3
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(float(value))))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(float(value))))
