"""Plots of results by matplotlib (extra ``report``), readable in black and white; the same results give the same bytes."""

import io
import textwrap
from collections.abc import Callable
from itertools import cycle
from typing import Any

from ...errors import InputError, nearest
from .plan import Benchmark
from .tables import Row, make_table

_MARKS = "osD^vP*Xh<>d"
_DASHES = ["-", "--", "-.", ":"]
_STYLES = [(dash, shade) for shade in ("black", "0.55") for dash in _DASHES]
_SMOOTH = 0.1  # of a curve's points that a moving average covers


def draw(plan: Benchmark, results: list[dict[str, Any]], key: str, kind: str) -> bytes:
    """Return one of a benchmark's plots as the bytes of a picture.

    Args:
        plan: The benchmark; ``report.plots`` says what it shows.
        results: Its results.
        key: The plot's name there.
        kind: ``svg`` or ``png``.

    Raises:
        InputError: If matplotlib is missing, or the plot needs a metric or curve that no result has.
    """
    entry = plan.spec["report"]["plots"][key]
    drawers: dict[str, Callable[..., None]] = {
        "scatter": _scatter,
        "bars": _bars,
        "curve": _curve,
        "timeline": _timeline,
        "heatmap": _heatmap,
        "matrix": _matrix,
        "lines": _lines,
    }
    title = entry.get("title", plan.spec["title"])
    maps = entry["kind"] == "heatmap"
    shape = (1, len(entry["only"])) if maps else (len(entry.get("panels", "1")), 1)
    height = 2.4 if maps else 4.2

    def fill(axes: Any) -> None:
        drawers[entry["kind"]]([axes] if maps and len(entry["only"]) == 1 else axes, plan, results, entry)

    return picture(fill, title, kind, height, shape)


def picture(fill: Callable[[Any], None], title: str, kind: str, height: float = 4.2, shape: tuple[int, int] = (1, 1)) -> bytes:
    """Return a picture's bytes.

    Args:
        fill: Draws into matplotlib axes, or into a list of them where there are several panels.
        title: Stands above.
        kind: ``svg`` or ``png``.
        height: In inches.
        shape: Panels below and beside each other; those below each other share the x axis.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError("Plots need the extra report: pip install 'fulgurite[report]'.") from error
    buffer = io.BytesIO()
    # Nothing that changes from call to call may get into the file.
    with matplotlib.rc_context({"svg.hashsalt": "fulgurite", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        stack = list(figure.subplots(*shape, sharex=True, sharey=shape[1] > 1, squeeze=False).flat)
        fill(stack[0] if len(stack) == 1 else stack)
        if shape[1] > 1:
            figure.suptitle(title)
        else:
            stack[0].set_title(title)
        for axes in stack:
            locator = axes.xaxis.get_major_locator()
            if isinstance(locator, MaxNLocator):
                locator.set_params(nbins=6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def draw_bars(axes: Any, titles: list[str], values: list[float], label: str, spreads: list[float] | None = None) -> None:
    """Draw horizontal bars, the first on top."""
    errors = None if spreads is None else spreads[::-1]
    axes.barh(titles[::-1], values[::-1], xerr=errors, color="0.8", edgecolor="black", capsize=2)
    axes.set_xlabel(label)


def _rows(plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any], *keys: str) -> list[Row]:
    table = make_table(plan, results, mixed=True)
    for key in keys:
        if key not in table.columns:
            raise InputError(f"plots of benchmark {plan.name!r}: {key!r} is no column of its report.")
    chosen = _chosen(plan, entry)
    return [row for row in table.rows if row.variant in chosen and all(row.cells[key].mean is not None for key in keys)]


def _chosen(plan: Benchmark, entry: dict[str, Any]) -> list[str]:
    variants = plan.spec["variants"]
    for name in entry.get("only", []):
        if name not in variants:
            raise InputError(f"plots of benchmark {plan.name!r}, only: {name!r} is no variant.{nearest(name, variants)}")
    return entry.get("only", list(variants))


def _name(title: str, group: str) -> str:
    return textwrap.fill(f"{title} ({group})" if group else title, 34)


def _label(plan: Benchmark, key: str) -> str:
    column = plan.spec["report"]["columns"].get(key, {"title": key.replace("_", " ")})
    text = f"{column['title']} ({column['unit']})" if "unit" in column else column["title"]
    return f"{text}, {column['better']} is better" if "better" in column else text


def _scatter(axes: Any, plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """One point a variant, with the spread over its seeds; a grey line joins those that no other beats in both."""
    x, y = entry["x"], entry["y"]
    rows = _rows(plan, results, entry, x, y)
    columns = plan.spec["report"]["columns"]
    signs = [1 if columns[key].get("better", "lower") == "lower" else -1 for key in (x, y)]
    points = [(row.cells[x].mean or 0.0, row.cells[y].mean or 0.0) for row in rows]
    front = sorted(
        one
        for one in points
        if not any(all(sign * a <= sign * b for sign, a, b in zip(signs, other, one)) and other != one for other in points)
    )
    axes.plot(*zip(*front), color="0.75", linewidth=1, zorder=0)
    for row, mark in zip(rows, cycle(_MARKS)):
        spread = {f"{axis}err": row.cells[key].spread for axis, key in (("x", x), ("y", y))}
        axes.errorbar(
            row.cells[x].mean,
            row.cells[y].mean,
            **spread,
            fmt=mark,
            color="black",
            mfc="white",
            capsize=2,
            label=_name(row.title, row.group),
        )
    axes.set_xlabel(_label(plan, x))
    axes.set_ylabel(_label(plan, y))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _bars(axes: Any, plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    rows = _rows(plan, results, entry, entry["y"])
    cells = [row.cells[entry["y"]] for row in rows]
    spreads = [cell.spread or 0.0 for cell in cells]
    draw_bars(
        axes,
        [_name(row.title, row.group) for row in rows],
        [cell.mean or 0.0 for cell in cells],
        _label(plan, entry["y"]),
        spreads,
    )


def _curve(axes: Any, plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """One line a variant: the mean over its seeds, smoothed by a moving average."""
    name = entry["y"]
    drawn = 0
    styles = cycle(_STYLES)
    for variant in _chosen(plan, entry):
        spec = plan.spec["variants"][variant]
        own = [result["metrics"]["curves"].get(name) for result in results if result["run"]["variant"] == variant]
        curves = [points for points in own if points]
        if not curves:
            continue
        finite = [{step: value for step, value in points if value is not None} for points in curves]
        shared = sorted(set.intersection(*(set(points) for points in finite)))
        values = [sum(points[step] for points in finite) / len(finite) for step in shared]
        width = max(1, round(len(values) * _SMOOTH))
        smooth = [sum(values[max(0, end - width) : end]) / min(width, end) for end in range(1, len(values) + 1)]
        dash, shade = next(styles)
        axes.plot(shared, smooth, linestyle=dash, color=shade, linewidth=1.2, label=_name(spec["title"], spec.get("group", "")))
        drawn += 1
    if not drawn:
        raise InputError(f"plots of benchmark {plan.name!r}: no result has the curve {name!r}.")
    for step in _changes(results, _chosen(plan, entry), entry.get("marks")):
        axes.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{_label(plan, name)} (moving average)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _changes(results: list[dict[str, Any]], variants: list[str], name: str | None) -> list[int]:
    """Return the steps at which a curve of the variants takes another value."""
    found = set()
    for result in results:
        points = result["metrics"]["curves"].get(name, []) if result["run"]["variant"] in variants else []
        found |= {step for (_, before), (step, now) in zip(points, points[1:]) if now != before}
    return sorted(found)


def _family(plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Return the curves ``<y>_<what>`` of one variant's first run, by what."""
    (variant,) = _chosen(plan, entry)
    runs = [result for result in results if result["run"]["variant"] == variant]
    curves = runs[0]["metrics"]["curves"] if runs else {}
    found = {name.removeprefix(f"{entry['y']}_"): points for name, points in curves.items() if name.startswith(f"{entry['y']}_")}
    if not found:
        raise InputError(f"plots of benchmark {plan.name!r}: {variant} has no curve {entry['y']}_<name>.")
    return found


def _matrix(axes: Any, plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """The curves ``<y>_<number>`` of one variant as the rows of a matrix; black is the largest magnitude."""
    rows = sorted((int(number), [value for _, value in points]) for number, points in _family(plan, results, entry).items())
    axes.imshow([[abs(value) for value in row] for _, row in rows], aspect="auto", cmap="gray_r", vmin=0)
    axes.set_xlabel(entry.get("x", "column"))
    axes.set_ylabel(_label(plan, entry["y"]))


def _lines(axes: Any, plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """The curves ``<y>_<name>`` of one variant, each over its own length."""
    for (name, points), (dash, shade) in zip(_family(plan, results, entry).items(), cycle(_STYLES)):
        places = [step / max(1, len(points) - 1) for step, _ in points]
        axes.plot(places, [value for _, value in points], linestyle=dash, color=shade, linewidth=1.2, label=name)
    axes.set_xlabel(entry.get("x", "place, of all"))
    axes.set_ylabel(_label(plan, entry["y"]))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _timeline(stack: list[Any], plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Some curves of one variant's first run, one below the other over the seconds of the run."""
    (variant,) = _chosen(plan, entry)
    runs = [result for result in results if result["run"]["variant"] == variant]
    for axes, (name, label) in zip(stack, entry["panels"].items()):
        points = runs[0]["metrics"]["curves"].get(name) if runs else None
        if not points:
            raise InputError(f"plots of benchmark {plan.name!r}: {variant} has no curve {name!r}.")
        axes.plot(*zip(*points), color="black", linewidth=1, drawstyle="steps-mid")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    stack[-1].set_xlabel("seconds of training")


def _heatmap(stack: list[Any], plan: Benchmark, results: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Shares by length and depth, a panel a variant, from its curves ``<y>_<length>``; means over its seeds."""
    for axes, variant in zip(stack, _chosen(plan, entry)):
        own = [result["metrics"]["curves"] for result in results if result["run"]["variant"] == variant]
        names = {name.rpartition("_") for curves in own for name in curves}
        lengths = sorted(int(length) for what, _, length in names if what == entry["y"])
        if not lengths:
            raise InputError(f"plots of benchmark {plan.name!r}: {variant} has no curve {entry['y']}_<length>.")
        rows = []
        for length in lengths:
            curves = [c[f"{entry['y']}_{length}"] for c in own]
            rows.append([sum(points) / len(points) for points in zip(*([value for _, value in curve] for curve in curves))])
        wide = max(map(len, rows))
        # A length with fewer prompts has broader fields.
        fields = [[row[place * len(row) // wide] for place in range(wide)] for row in rows]
        axes.imshow(fields, aspect="auto", cmap="gray", vmin=0, vmax=1, extent=(0, 1, len(lengths) - 0.5, -0.5))
        axes.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_title(_name(plan.spec["variants"][variant]["title"], ""), fontsize=8)
        axes.set_xlabel("depth of the key")
    stack[0].set_ylabel("tokens")
