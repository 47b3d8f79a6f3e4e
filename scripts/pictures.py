"""Pictures of result files, drawn anew from scripts/results/*.json: python scripts/pictures.py

lds_lora.png    k against LDS, with what retrainings agree among themselves
peers.png       LDS and the seconds of a query, for every library of the comparison
mnist.png       LDS on MNIST against networks that were trained and against seconds
vision.png, vision_scratch.png, text_classification.png    LDS of each method
smollm2_curve.png, mnist_curve.png  share of the top ten found on SmolLM2-135M and on MNIST, against forward passes
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot


RESULTS = Path(__file__).parent / "results"


def kept(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def probes_against_lds(result: dict[str, Any], target: Path) -> None:
    """LDS of banks with so many directions, beside the exact bank, the gradient dot product and the noise ceiling."""
    figure, axis = pyplot.subplots(figsize=(4.6, 3.2))
    rows = {row["method"]: row for row in result["rows"]}
    few = [row for name, row in rows.items() if name.endswith(f"k = {row['directions']}")]
    errors = [[row["LDS"] - row["low"] for row in few], [row["high"] - row["LDS"] for row in few]]
    axis.errorbar(
        [row["directions"] for row in few], [row["LDS"] for row in few], errors, fmt="o-", ms=4, label="directions"
    )
    lines = [
        ("exact, mean of ends", rows.get("bank, exact, mean of ends", {}).get("LDS"), ":"),
        ("exact", rows["bank, exact, three segments"]["LDS"], "--"),
        ("one retraining", result["noise_ceiling"], "-."),
        ("gradient dot product", rows["gradient dot product"]["LDS"], "-"),
    ]
    for number, (name, value, style) in enumerate(lines):
        if value is not None:
            axis.axhline(value, color=f"C{number + 1}", ls=style, lw=1, label=name)
    axis.set(xscale="log", xlabel="directions k", ylabel="LDS", xticks=[row["directions"] for row in few])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="lower right")
    _save(figure, target)


def cost_and_lds(result: dict[str, Any], target: Path) -> None:
    """Each line of the peers' table that ran: LDS with its interval, and processor seconds a query."""
    rows = [row for row in result["rows"] if row["LDS"] != "-"][::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 0.22 * len(rows) + 0.9), sharey=True)
    colours = {"none": "C2", "query": "C0", "query and rows": "C1"}
    for place, row in enumerate(rows):
        colour = colours[row["backward"]]
        left.errorbar(row["LDS"], place, xerr=[[row["LDS"] - row["low"]], [row["high"] - row["LDS"]]], fmt="o",
                      ms=4, color=colour)  # fmt: skip
        right.plot(max(row["s / query"], 1e-3), place, "o", ms=4, color=colour)
    names = [f"{row['peer'].split()[0]} {row['method']}, {row['setting']}" for row in rows]
    left.set_yticks(range(len(rows)), names, fontsize=6.5)
    left.set_xlabel("LDS", fontsize=8)
    right.set_xscale("log")
    right.set_xlabel("processor seconds a query", fontsize=8)
    for axis in (left, right):
        axis.grid(axis="y", lw=0.3)
        axis.tick_params(axis="x", labelsize=7)
    for need, colour in colours.items():
        left.plot([], [], "o", ms=4, color=colour, label=f"backward: {need}")
    left.legend(fontsize=6.5, loc="upper left")  # the best stand at the top, on the right
    _save(figure, target)


def passes_against_top(result: dict[str, Any], target: Path) -> None:
    """Every way of reading that has more than one line: the share of the top ten that it finds."""
    figure, axis = pyplot.subplots(figsize=(7.2, 3.2))
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if not row["method"].startswith("exact"):
            lines.setdefault(row["method"], []).append(row)
    for number, (name, line) in enumerate(lines.items()):
        passes, found = [[row[key] for row in line] for key in ("forward passes", "of the top ten")]
        axis.plot(passes, found, "o-" if len(line) > 1 else "*", ms=4, color=f"C{number % 10}", lw=1, label=name)
    axis.set(xscale="log", xlabel="forward passes per query", ylabel="share of the top ten", ylim=(0, 1.03))
    most = max(row["forward passes"] for line in lines.values() for row in line)
    axis.set_xticks([2**power for power in range(12) if 2**power <= 1.1 * most])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, target)


def networks_against_lds(ours: dict[str, Any], theirs: dict[str, Any], target: Path) -> None:
    """LDS on MNIST of one, five, ten ... networks: against their number, and against the seconds of all scores."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.8, 3.4), sharey=True)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in (row for row in ours["rows"] if row["LDS 10"] != "-"):
        lines[row["method"]] = [
            (count, row[f"LDS {count}"], count * row["s"]) for count in (1, 5, 10) if row[f"LDS {count}"] != "-"
        ]
    ran = [row for row in theirs["rows"] if row["LDS"] != "-"]
    tuned = [row for row in ran if "damping" in row["method"]]
    for row in [row for row in ran if row not in tuned] + sorted(tuned, key=lambda row: -row["LDS"])[:1]:
        # Seconds as if a method that answered some of the queries had answered all of them.
        seconds = row["s"] * max(other["queries"] for other in ran) / row["queries"]
        name = re.sub(r", \d+ networks?", "", row["method"])
        lines.setdefault(name, []).append((row["networks"], row["LDS"], seconds))
    for number, (name, line) in enumerate(lines.items()):
        style = "s--" if name.startswith("dattri") else "o-"
        values = [point[1] for point in sorted(line)]
        for axis, place in ((left, 0), (right, 2)):
            axis.plot([point[place] for point in sorted(line)], values, style, color=f"C{number % 10}", ms=4, lw=1,
                      label=name)  # fmt: skip
    for axis, name in ((left, "networks"), (right, "seconds of one thread for all scores, training apart")):
        axis.axhline(ours["noise_ceiling"], color="0.5", ls=":", lw=1, label="one retraining against the others")
        axis.set_xscale("log")
        axis.set_xlabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(lw=0.3)
    left.set_xticks([1, 5, 10, 50], ["1", "5", "10", "50"])
    left.minorticks_off()
    left.set_ylabel("LDS", fontsize=8)
    right.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, target)


def methods_and_lds(result: dict[str, Any], target: Path) -> None:
    """LDS of each method with its interval, and what one retraining says of another."""
    rows = [row for row in result["rows"] if row["LDS"] != "-"][::-1]
    figure, axis = pyplot.subplots(figsize=(5.6, 0.26 * len(rows) + 0.8))
    for place, row in enumerate(rows):
        axis.errorbar(row["LDS"], place, xerr=[[row["LDS"] - row["low"]], [row["high"] - row["LDS"]]], fmt="o", ms=4,
                      color="C2" if row["method"].startswith("bank") else "C0")  # fmt: skip
    axis.axvline(result["noise_ceiling"], color="0.5", ls=":", lw=1, label="one retraining")
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7)
    axis.set_xlabel("LDS", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="y", lw=0.3)
    axis.legend(fontsize=6.5)
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    pyplot.close(figure)
    print(f"wrote {target.name}")


def main() -> None:
    probes_against_lds(kept("lds_lora"), RESULTS / "lds_lora.png")
    cost_and_lds(kept("peers"), RESULTS / "peers.png")
    passes_against_top(kept("smollm2_curve"), RESULTS / "smollm2_curve.png")
    passes_against_top(kept("mnist_curve"), RESULTS / "mnist_curve.png")
    networks_against_lds(kept("mnist_mlp"), kept("mnist_peers"), RESULTS / "mnist.png")
    for name in ("vision", "vision_scratch", "text_classification"):
        methods_and_lds(kept(name), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
