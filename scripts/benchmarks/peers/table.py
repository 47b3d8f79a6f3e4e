"""Lines of the tables with other libraries: which of the tried settings are shown, and how.

Each method is shown as its library ships it, and with the setting that scored best *on this truth*, which is not known
in practice: it favours the peers. A method that could not be run is shown with its error.
"""

import json
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .exchange import Exchange


__all__ = ["chosen", "judged", "line"]


def judged(exchange: Exchange, judge: Callable[[Tensor], dict[str, float]]) -> list[dict[str, Any]]:
    """Return every record in the folder with its figures, or with the error that kept it from them."""
    records = []
    for path in sorted((exchange.folder / "scores").glob("*.json")):
        record = json.loads(path.read_text())
        if record["error"] is None:
            try:
                record |= judge(load_file(path.with_suffix(".safetensors"))["scores"])
                record["s / query"] = record["query_s"] / len(exchange.queries)
            except ValueError as error:  # scores that are not finite, for one
                record["error"] = str(error)
        records.append(record)
    return records


def chosen(records: list[dict[str, Any]], by: str = "LDS") -> list[dict[str, Any]]:
    """Choose, of each peer, method and number of models: as shipped, the best other setting, and failures."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["peer"], record["method"], record["models"]), []).append(record)
    kept = []
    for group in groups.values():
        shipped = [record for record in group if record["shipped"]]
        ran = [record for record in group if record["error"] is None]
        best = max(ran, key=lambda record: record[by], default=None)
        kept += shipped
        errors = {record["error"] for record in shipped}
        for record in group:
            if record["error"] is not None and record["error"] not in errors:
                errors.add(record["error"])
                kept.append(record)
        if best is not None and not any(best is record for record in kept):
            kept.append(best)
    return sorted(kept, key=lambda record: -record.get(by, -2))


def line(record: dict[str, Any], figures: tuple[str, ...]) -> dict[str, Any]:
    """Return one line of the printed table."""
    models = f", {record['models']} models" if record["models"] > 1 else ""
    shipped = " (as shipped)" if record["shipped"] else ""
    head = {"peer": record["peer"], "method": record["method"] + models, "setting": record["setting"] + shipped}
    if record["error"] is not None:
        return head | dict.fromkeys(figures, "-") | {"backward": record["error"]}
    values = record | {"bytes / row": round(record["row_bytes"]), "build s": record["build_s"]}
    return head | {key: "-" if values[key] is None else values[key] for key in (*figures, "backward")}
