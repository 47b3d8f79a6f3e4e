"""Run as a process of its own: starts groups of ranks one group after the other, as torchrun would.

    python -m tests.helpers.forked_ranks <folder> '[[2, ["plain", "saved"]], [4, ["resumed"]]]'

Ranks are forked here, once torch and transformers are imported: that import takes longer than all of the runs. Writes
<folder>/group-<number>.txt with the streams of all ranks, and prints the first exit code of each group that is not 0.
"""

import gc
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

from tests.helpers import ranks


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fork(environment: dict[str, str], output: int, folder: Path, names: list[str]) -> int:
    """Return the id of a new process that runs these names as one rank, both its streams going to `output`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        ranks.main(folder, names)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_group(count: int, folder: Path, names: list[str], output: Path) -> int:
    """Return 0 once all ranks have ended, or the first other exit code (minus a signal); the rest is then killed."""
    settings = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    with output.open("w") as stream:
        children = {
            fork(settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stream.fileno(), folder, names)
            for rank in range(count)
        }
    first = 0
    while children:
        ended, status = os.wait()
        children.remove(ended)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for child in children:
                os.kill(child, signal.SIGKILL)
    return first


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: Trainer collects garbage at the end of every training
    where = Path(sys.argv[1])
    for number, (count, names) in enumerate(json.loads(sys.argv[2])):
        print(run_group(count, where, names, where / f"group-{number}.txt"), flush=True)
