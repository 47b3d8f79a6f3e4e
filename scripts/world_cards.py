"""Cards of the worlds that attribution was measured on: which result files and pictures each shows.

`scripts/cards` renders them into model_cards/<name>/README.md by model_cards/WORLD.md.jinja. Every figure in a card
comes from scripts/results; here stand only what a world is, and the columns of its tables, in the words of `tables`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import tables


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
RESULTS = Path(__file__).parent / "results"
_BESIDE = ("title", "rows", "wall_s", "machine", "tried", "settings")  # shown in their own place, or too long


@dataclass(frozen=True)
class Measured:
    """A result file: its script, its columns (all where there are none), and a picture of it with what it shows."""

    result: str
    command: str
    columns: str = ""
    picture: str | None = None
    shows: str = ""

    def facts(self) -> dict[str, Any]:
        """What the table needs: title, Markdown of it, numbers beside its rows, machine and wall time."""
        kept = json.loads((RESULTS / f"{self.result}.json").read_text(encoding="utf-8"))
        columns = [tables.Column(part) for part in self.columns.split(";") if part.strip()]
        beside = {key.replace("_", " "): value for key, value in kept.items() if key not in _BESIDE}
        beside = {key: value for key, value in beside.items() if isinstance(value, int | float)}
        return {
            "title": kept["title"], "table": tables.table(kept, columns).rstrip(), "beside": beside,
            "wall_s": kept["wall_s"], "machine": kept["machine"],
        }  # fmt: skip


@dataclass(frozen=True)
class World:
    """A model, its rows and its queries.

    Attributes:
        name: of the card's folder.
        base: repository of the base model on the Hub; None where it is made on the spot.
        what: what is trained on what, in a few sentences.
        notes: what a reader of the tables should know, one sentence each.
    """

    name: str
    title: str
    what: str
    measured: tuple[Measured, ...]
    base: str | None = None
    library: str = "peft"
    notes: tuple[str, ...] = field(default=())


LDS = "method; LDS **; low..high 95 %; kept as score variance kept"
WORLDS = (
    World(
        "lora-news",
        "A small GPT-2 with LoRA on 40 news articles",
        "A GPT-2 of 0.9 M parameters, trained on the spot on State of the Union addresses, is fine-tuned with LoRA "
        "(r = 8, every projection) on 480 passages of 40 news articles. A query is a passage held out of one.",
        (
            Measured("lds_lora", "python scripts/lds_lora.py", LDS, "lds_lora.png", "k against LDS"),
            Measured(
                "peers", "bash scripts/peers/all",
                "peer as library; method; setting; LDS **; low..high 95 %; s / query:2; backward", "peers.png",
                "LDS against cost",
            ),
            Measured(
                "lora_loo", "python scripts/lora_loo.py",
                "left out; n; spearman; spearman_low..spearman_high 95 %; pearson; slope", "lora_loo.png",
                "Calibration: predicted against measured change of the loss",
            ),
            Measured(
                "readout_curve", "python scripts/readout_curve.py",
                "method; forward passes:0; LDS; all of the top ten:2; of the top ten:2", "readout_curve.png",
                "LDS and share of the top ten, against forward passes",
            ),
        ),
        notes=("A library's setting that is not as shipped is the best of those tried on this very truth.",),
    ),
    World(
        "smollm2-news",
        "SmolLM2-135M with LoRA on news of nine publishers",
        "SmolLM2-135M is fine-tuned with LoRA on the q and v projections: on six articles of each publisher, each of "
        "whom is left out in turn, and on 2,000 passages of all of them.",
        (
            Measured("smollm2_sources", "python scripts/smollm2_sources.py"),
            Measured(
                "smollm2_curve", "python scripts/smollm2_curve.py",
                "method; forward passes:0; of the top ten:2; all of the top ten:2; correlation:2", "smollm2_curve.png",
                "Share of the top ten found, against forward passes",
            ),
            Measured("smollm2_news", "python scripts/smollm2_news.py --rows 14"),
            Measured(
                "cost_smollm2", "python scripts/cost.py --smollm2 --rows 48 --pairs 3",
                "what; ratio:2 as median; low..high lowest to highest",
            ),
        ),
        base="HuggingFaceTB/SmolLM2-135M",
    ),
    World(
        "mnist",
        "784-128-64-10 on 5,000 digits",
        "The benchmark of the paper: SGD with momentum, 50 epochs, dropout 0.1; 50 random halves, each trained five "
        "times with a fresh seed; 500 queries. Several networks' scores are averaged.",
        (
            Measured(
                "mnist_mlp", "python scripts/mnist_mlp.py",
                "method; LDS 1 as one network **; low..high each of ten; LDS 5 as five **; LDS 10 as ten **; "
                "LOO Spearman as leave-one-out", "mnist.png", "LDS against networks and against time",
            ),
            Measured(
                "mnist_peers", "python scripts/mnist_mlp.py --peers FOLDER",
                "method; networks; queries; LDS **; LOO Spearman as leave-one-out; s:0 as processor s; error",
            ),
            Measured(
                "mnist_ablation", "python scripts/mnist_mlp.py --ablate", picture="mnist_ablation.png",
                shows="One setting at a time, on the first network",
            ),
            Measured("mnist_cost", "python scripts/mnist_mlp.py", "query; forwards:1; backward"),
        ),
        library="pytorch",
        notes=(
            "Seconds of our methods are those of inner products of gradients, which give a bank's scores without "
            "vectors of parameters; dattri's are its own. Training is apart in both.",
            "Leaving single rows out cannot be told from chance on this recipe: see the README.",
        ),
    ),
    World(
        "vision",
        "A vision transformer on 600 Fashion-MNIST images",
        "A vision transformer of 20,000 weights, all of which respond, trained on 4,000 images and fine-tuned on 600 "
        "others; and the same from nothing.",
        (
            Measured("vision", "python scripts/vision.py", LDS, "vision.png", "LDS of each method"),
            Measured(
                "vision_scratch", "python scripts/vision.py --scratch", LDS, "vision_scratch.png",
                "LDS of each method, trained from nothing",
            ),
        ),
        library="transformers",
    ),
    World(
        "headlines",
        "MiniLM-L6 with LoRA on 400 headlines, some with the wrong label",
        "Sarcasm or not, with 40 labels turned round on purpose.",
        (
            Measured(
                "text_classification", "python scripts/text_classification.py", picture="text_classification.png",
                shows="LDS of each method",
            ),
        ),
        base="sentence-transformers/all-MiniLM-L6-v2",
    ),
)  # fmt: skip


def rendered(world: World) -> str:
    """The card of a world."""
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).from_string((CARDS / "WORLD.md.jinja").read_text(encoding="utf-8"))
    measured = [(own, own.facts()) for own in world.measured]
    return template.render(world=world, measured=measured)
