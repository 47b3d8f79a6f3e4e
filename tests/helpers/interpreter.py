"""Fresh interpreters: what a first import or a command loads."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def fresh(code: str, arguments: Sequence[Any] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with the arguments of a command line."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


LOADED = "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
COMMAND = "import atexit, sys; atexit.register(lambda: " + LOADED + "); from hf_fwdattr.cli import main; main()"
