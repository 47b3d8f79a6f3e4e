"""Push banks in child processes, whose ids are printed, so that tests can kill them.

Each line read is a folder to push to the repository in the first argument; the answer is the child's id at once, and
"done", "failed" or "killed" when it has ended.
"""

import os
import sys
from pathlib import Path

from hf_fwdattr import ResponseBank
from hf_fwdattr.errors import BankError


def push(folder: Path) -> int:
    try:
        ResponseBank(folder).push_to_hub(sys.argv[1])
    except BankError:
        return 1
    return 0


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(push(Path(line.strip())))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "failed" if status else "done", flush=True)
