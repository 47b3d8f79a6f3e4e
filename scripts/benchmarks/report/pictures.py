"""Pictures of results: most are drawn from the result files alone, calibration from what was measured."""

import re
from typing import Any

import torch

from . import results


def _axes(*shape: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, figsize=size, **options)


def _save(figure: Any, name: str) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(results.FOLDER / f"{name}.png", dpi=80)
    pyplot.close(figure)
    print(f"wrote {name}.png")


def _grouped(rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _interval(axis: Any, place: float, row: dict[str, Any], colour: str) -> None:
    error = [[row["LDS"] - row["low"]], [row["high"] - row["LDS"]]]
    axis.errorbar(row["LDS"], place, xerr=error, fmt="o", ms=4, color=colour)


def directions_lds(result: dict[str, Any], name: str) -> None:
    """Draw LDS against directions, beside exact banks, the gradient dot product and the noise ceiling."""
    figure, axis = _axes(size=(4.6, 3.2))
    rows = {row["method"]: row for row in result["rows"]}
    few = [row for label, row in rows.items() if label.endswith(f"k = {row['directions']}")]
    errors = [[row["LDS"] - row["low"] for row in few], [row["high"] - row["LDS"] for row in few]]
    counts = [row["directions"] for row in few]
    axis.errorbar(counts, [row["LDS"] for row in few], errors, fmt="o-", ms=4, label="directions")
    lines = (
        ("exact, trajectory average", rows["bank, exact, trajectory average"]["LDS"], ":"),
        ("exact", rows["bank, exact, three segments"]["LDS"], "--"),
        ("one retraining", result["noise_ceiling"], "-."),
        ("gradient dot product", rows["gradient dot product"]["LDS"], "-"),
    )
    for number, (label, value, style) in enumerate(lines):
        axis.axhline(value, color=f"C{number + 1}", ls=style, lw=1, label=label)
    axis.set(xscale="log", xlabel="directions k", ylabel="LDS", xticks=counts)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="lower right")
    _save(figure, name)


def methods_lds(result: dict[str, Any], name: str) -> None:
    """Draw the LDS of each method with its interval, and what one retraining says of another."""
    rows = [row for row in result["rows"] if row["LDS"] != "-"][::-1]
    figure, axis = _axes(size=(5.6, 0.26 * len(rows) + 0.8))
    for place, row in enumerate(rows):
        _interval(axis, place, row, "C2" if row["method"].startswith("bank") else "C0")
    axis.axvline(result["noise_ceiling"], color="0.5", ls=":", lw=1, label="one retraining")
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7)
    axis.set_xlabel("LDS", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="y", lw=0.3)
    axis.legend(fontsize=6.5)
    _save(figure, name)


def peers(result: dict[str, Any], name: str) -> None:
    """Draw each line of the peers' table that ran: LDS with its interval, and processor's seconds of a query."""
    rows = [row for row in result["rows"] if row["LDS"] != "-"][::-1]
    figure, (left, right) = _axes(1, 2, size=(8.4, 0.22 * len(rows) + 0.9), sharey=True)
    colours = {"none": "C2", "query": "C0", "query and rows": "C1"}
    for place, row in enumerate(rows):
        _interval(left, place, row, colours[row["backward"]])
        right.plot(max(row["s / query"], 1e-3), place, "o", ms=4, color=colours[row["backward"]])
    names = [f"{row['peer'].split()[0]} {row['method']}, {row['setting']}" for row in rows]
    left.set_yticks(range(len(rows)), names, fontsize=6.5)
    left.set_xlabel("LDS", fontsize=8)
    right.set_xscale("log")
    right.set_xlabel("processor's seconds of a query", fontsize=8)
    for axis in (left, right):
        axis.grid(axis="y", lw=0.3)
        axis.tick_params(axis="x", labelsize=7)
    for need, colour in colours.items():
        left.plot([], [], "o", ms=4, color=colour, label=f"backward: {need}")
    left.legend(fontsize=6.5, loc="upper left")  # the best stand at the top, on the right
    _save(figure, name)


def budget_curve(result: dict[str, Any], name: str) -> None:
    """Draw the share of the top ten that every way of reading finds, against forward passes."""
    figure, axis = _axes(size=(7.2, 3.2))
    rows = [row for row in result["rows"] if not row["method"].startswith("exact")]
    for number, (label, line) in enumerate(_grouped(rows, "method").items()):
        passes, found = [[row[key] for row in line] for key in ("forward passes", "of the top ten")]
        axis.plot(passes, found, "o-" if len(line) > 1 else "*", ms=4, color=f"C{number % 10}", lw=1, label=label)
    axis.set(xscale="log", xlabel="forward passes per query", ylabel="share of the top ten", ylim=(0, 1.03))
    most = max(row["forward passes"] for row in rows)
    axis.set_xticks([2**power for power in range(12) if 2**power <= 1.1 * most])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, name)


def networks_lds(result: dict[str, Any], name: str) -> None:
    """Draw LDS on MNIST, ours and dattri's, against the number of networks and against seconds."""
    figure, (left, right) = _axes(1, 2, size=(8.8, 3.4), sharey=True)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in result["rows"]:
        for count in (1, 5, 10):
            if row["LDS 10"] != "-":
                lines.setdefault(row["method"], []).append((count, row[f"LDS {count}"], count * row["s"]))
    for row in results.load_result(name.replace("lds", "peers"))["rows"]:
        if row["LDS"] != "-":
            label = re.sub(r", \d+ networks?", "", row["method"])
            lines.setdefault(label, []).append((row["networks"], row["LDS"], row["s"]))
    for number, (label, line) in enumerate(lines.items()):
        counts, values, seconds = zip(*sorted(line), strict=True)
        style = "s--" if label.startswith("dattri") else "o-"
        for axis, places in ((left, counts), (right, seconds)):
            axis.plot(places, values, style, color=f"C{number % 10}", ms=4, lw=1, label=label)
    for axis, label in ((left, "networks"), (right, "seconds of one thread for all scores, training apart")):
        axis.axhline(result["noise_ceiling"], color="0.5", ls=":", lw=1, label="one retraining against the others")
        axis.set_xscale("log")
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(lw=0.3)
    left.set_xticks([1, 5, 10, 50], ["1", "5", "10", "50"])
    left.minorticks_off()
    left.set_ylabel("LDS", fontsize=8)
    right.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, name)


def settings(result: dict[str, Any], name: str) -> None:
    """Draw quality against each setting of an ablation, one small panel each."""
    groups = _grouped(result["rows"], "setting")
    columns = -(-len(groups) // 2)
    figure, axes = _axes(2, columns, size=(2.6 * columns, 4.6), squeeze=False)
    for axis, (setting, own) in zip(axes.flat, groups.items(), strict=False):
        for key, style in (("LDS", "o-"), ("LOO Spearman", "s--")):
            axis.plot([row["value"] for row in own], [row[key] for row in own], style, markersize=3, label=key)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.set_title(setting, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(groups) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=7)
    _save(figure, name)


def calibration(panels: dict[str, Any], name: str) -> None:
    """Draw predicted against measured change of every pair of query and what was left out."""
    figure, axes = _axes(1, len(panels), size=(3.6 * len(panels), 3.4))
    for axis, (label, found) in zip(axes, panels.items(), strict=True):
        axis.plot(found.predicted.flatten(), found.measured.flatten(), ".", markersize=2, alpha=0.5)
        ends = torch.tensor([found.predicted.min(), found.predicted.max()])
        axis.plot(ends, ends, "-", color="grey", lw=0.8)
        axis.plot(ends, found.slope * ends, "--", color="black", lw=0.8)
        axis.set_title(f"{label}: Pearson {found.pearson:.2f}, slope {found.slope:.2f}", fontsize=8)
        axis.set_xlabel("predicted rise of the loss, nats", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("measured rise, nats", fontsize=8)
    _save(figure, name)
