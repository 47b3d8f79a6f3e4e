"""Run as a process of its own: a fine-tune whose end is repeated by children that are killed in it.

Children are forked where training has ended, so that each needs only the time of the passes and of the write. Writes
the state after each kill as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_fwdattr import ResponseBank, ResponseCallback, build_bank
from hf_fwdattr.errors import BankError
from hf_fwdattr.trainer.callback import RECORD
from tests.bank.test_bank import FILES, is_seed, written
from tests.helpers.cases import adapted, padded
from tests.helpers.runs import base, config, trainer_for, training_set


PASSES, SAVES = 50, 30


def killed(work: Callable[[], Any], after: float | None) -> float:
    """Run the work in a child, kill it after so many seconds, and return its time; negative if it was killed."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return -1.0 if os.WIFSIGNALED(status) else time.monotonic() - start


def state_of(folder: Path, old: str | None) -> str:
    """Return `old`, `new`, or `none` without a bank; anything else is an error."""
    try:
        bank = ResponseBank.from_pretrained(folder)
        bank.directions(), list(bank.coordinates()), list(bank.row_hashes())
    except BankError as error:
        return "none" if old is None and str(error).startswith("no bank in") else f"broken: {error}"
    return "old" if bank.manifest.salt == old else "new"


class KilledCallback(ResponseCallback):
    """A callback whose end is first run by children that are killed."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end = super().on_train_end
        out = Path(args.output_dir)
        whole = killed(lambda: end(args, state, control, **kwargs), None)
        old_folder = out.parent / "old"
        shutil.move(out / "fwdattr", old_folder)
        old = ResponseBank(old_folder).manifest.salt
        self.states: list[tuple[str, str]] = []
        generator = random.Random(0)
        for number in range(3 * PASSES):
            if sum(how == "killed" for how, _ in self.states) >= PASSES:
                break
            shutil.rmtree(out / "fwdattr", ignore_errors=True)
            if number % 2:
                shutil.copytree(old_folder, out / "fwdattr")
            spent = killed(lambda: end(args, state, control, **kwargs), generator.uniform(0, 1.1 * whole))
            whole = min(whole, spent) if spent > 0 else whole  # a machine that got quieter must not outrun the kills
            self.states.append(("killed" if spent < 0 else "done", state_of(out, old if number % 2 else None)))
        # The last time it is killed when the record is surely there and the bank surely not.
        shutil.rmtree(out / "fwdattr", ignore_errors=True)
        self.last = killed(lambda: end(args, state, control, **kwargs), 0.4 * whole)
        self.last_state = state_of(out, None)


def passes(folder: Path) -> dict[str, Any]:
    """Kills in the callback's passes; afterwards the bank is finished from the record."""
    model, data = adapted(base()), training_set(16)
    settings = config(directions=8, capture="after")  # the first child to end removes what was captured
    callback = KilledCallback(settings)
    trainer_for(folder / "run", model, data, callback, max_steps=6).train()
    made = build_bank(
        model, data, settings, data_collator=padded, record=folder / "run" / f"_{RECORD}",
        folder=folder / "run" / "fwdattr",
    )  # fmt: skip
    same = made.directions().sub(ResponseBank(folder / "old").directions()).abs().max() < 1e-5
    left = [path.name for path in (folder / "run" / "fwdattr").iterdir()]
    return {
        "states": callback.states, "last": [callback.last, callback.last_state], "same": bool(same),
        "stray": len(left) - 1 - len(made.manifest.files),
    }  # fmt: skip


def saves(folder: Path) -> dict[str, Any]:
    """Kills while a bank is copied over another one."""
    sources = [written(folder / str(seed), seed=seed) for seed in range(2)]
    target = folder / "model"
    states: list[tuple[str, str]] = []
    sources[0].save_pretrained(target)
    whole = killed(lambda: sources[1].save_pretrained(target), None)
    generator = random.Random(1)
    for number in range(3 * SAVES):
        if number >= SAVES and sum(how == "killed" for how, _ in states) >= SAVES // 2:
            break
        source = sources[number % 2]
        spent = killed(lambda source=source: source.save_pretrained(target), generator.uniform(0, whole))  # type: ignore[misc]
        whole = min(whole, spent) if spent > 0 else whole
        bank = ResponseBank.from_pretrained(target)
        states.append(("killed" if spent < 0 else "done", "ok" if is_seed(bank, 0) or is_seed(bank, 1) else "mixture"))
    sources[0].save_pretrained(target)
    return {"states": states, "stray": len(list((target / "fwdattr").iterdir())) - FILES}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    report = {"passes": passes(where / "passes"), "saves": saves(where / "saves")}
    Path(sys.argv[2]).write_text(json.dumps(report))
