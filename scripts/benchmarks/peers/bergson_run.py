"""EK-FAC, EK-FAC with CG, ASTRA, TrackStar and TRAK with bergson, through its command line, in its own environment:

python peers/bergson_run.py FOLDER
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from exchange import Exchange, Result, hand_in, seconds


PEER = "bergson 2.5.1"
FIXED = Path(__file__).parent / "bergson_copied.py"


class Bergson:
    """The commands of bergson on the exchange's model and rows."""

    def __init__(self, exchange: Exchange, scratch: str):
        self.exchange, self.scratch = exchange, Path(scratch)
        for name, tokens in (("rows", exchange.rows), ("queries", exchange.queries)):
            columns = {"input_ids": tokens.tolist(), "labels": tokens.tolist()}
            Dataset.from_dict(columns).save_to_disk(str(self.scratch / name))

    def run(self, name: str, command: str, *options: str, fixed: bool = False) -> Result:
        """Run a command, `fixed` as in bergson_copied.py; return its scores, higher is better, and its time.

        The steps of a command cannot be told apart from outside: `query_s` is all of it, the rows' gradients too.
        """
        folder = self.scratch / name
        began = seconds()
        done = subprocess.run(
            [
                *([sys.executable, str(FIXED)] if fixed else [sys.executable, "-m", "bergson"]), command, str(folder),
                "--model", str(self.exchange.folder / "adapters" / "0"),
                "--tokenizer", str(self.exchange.folder / "base"),
                "--data.dataset", str(self.scratch / "rows"),
                "--query.dataset", str(self.scratch / "queries"),
                "--token_batch_size", "64", *options,
            ],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if done.returncode:
            (self.exchange.folder / f"{name}.log").write_text(done.stdout + done.stderr)
            if done.returncode < 0:
                raise RuntimeError(f"its process was ended by {signal.Signals(-done.returncode).name}")
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(
                next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "?")
            )
        spent = seconds() - began
        return Result(self.scores(folder / "scores"), None, spent, self.row_bytes(folder))

    def scores(self, folder: Path) -> torch.Tensor:
        """Return scores (queries, rows) from a score folder, whatever its sign."""
        from bergson.data import load_scores_loss_signed

        values, _ = load_scores_loss_signed(str(folder))  # negative scores reduce the query's loss
        return -values.reshape(len(self.exchange.rows), -1).T

    def row_bytes(self, folder: Path) -> float:
        """Return the bytes of a stored gradient index per row; 0 if every query computes the rows' gradients anew."""
        files = [p for p in folder.rglob("gradients.bin") if "quer" not in str(p.relative_to(folder))]
        return sum(p.stat().st_size for p in files) / len(self.exchange.rows)


def main():
    exchange = Exchange(sys.argv[1], sys.argv[2:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        bergson = Bergson(exchange, scratch)

        def add(name, command, method, setting, *options, shipped=False, backward, fixed=False):
            hand_in(exchange, f"bergson-{name}", lambda: bergson.run(name, command, *options, fixed=fixed), peer=PEER,
                    method=method, setting=setting, shipped=shipped, backward=backward)  # fmt: skip

        def ekfac(name, method, setting, damping, *options, shipped=False, fixed=False):
            add(name, "ekfac", method, setting, "--method", "kfac", "--hessian_cfg.ev_correction", "True",
                "--hessian_pipeline_cfg.inversion_cfg.damping_factor", f"{damping:g}", *options, shipped=shipped,
                backward="query and rows", fixed=fixed)  # fmt: skip

        for damping in (0.1, 10.0, 1.0):
            ekfac(f"ekfac-{damping:g}", "EK-FAC", f"damping {damping:g} of the mean", damping, shipped=damping == 0.1)
        for size in (16, 64):
            add(f"trackstar-{size}", "trackstar", "TrackStar", f"projection {size}", "--projection_dim", str(size),
                shipped=size == 16, backward="query and rows")  # fmt: skip
        add("trackstar-64-unit", "trackstar", "TrackStar", "projection 64, unit norms", "--projection_dim", "64",
            "--unit_normalize", "True", backward="query and rows")  # fmt: skip
        add("trak", "trak", "TRAK", "defaults", shipped=True, backward="query and rows")
        add("trak-odds", "trak", "TRAK", "log odds and one projection, as its errors ask", "--loss_fn", "log_odds",
            "--projection_target", "global", backward="query and rows")  # fmt: skip
        # On a CPU both end with SIGSEGV as shipped, hence the fix. Its leaderboard takes 20 steps on 256 rows.
        cg = ("--solver", "cg", "--num_steps", "10", "--astra.batch_size", "64")
        for fixed, word, end in ((False, "", ""), (True, ", with a fix of ours", "-fixed")):
            ekfac(f"astra{end}", "EK-FAC + ASTRA", "20 steps, defaults otherwise" + word, 0.1, "--num_steps", "20",
                  shipped=not fixed, fixed=fixed)  # fmt: skip
            ekfac(f"astra-10{end}", "EK-FAC + ASTRA", "20 steps, damping 10" + word, 10.0, "--num_steps", "20",
                  fixed=fixed)  # fmt: skip
            for damping in (10.0, 1.0):
                ekfac(f"cg-{damping:g}{end}", "EK-FAC + CG", f"10 steps, 64 rows, damping {damping:g}{word}", damping,
                      *cg, shipped=damping == 10 and not fixed, fixed=fixed)  # fmt: skip


if __name__ == "__main__":
    main()
