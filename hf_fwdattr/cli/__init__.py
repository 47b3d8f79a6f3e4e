"""The command line: `hf-fwdattr demo | build | attribute | evaluate | inspect | push`."""

import os
import sys


__all__ = ["main"]

_LOG_INTERVAL = "60"  # seconds between two lines of a progress bar in a log


def main() -> None:
    """Run the command line; without typer, say in one sentence how to install it."""
    if not sys.stderr.isatty():
        # tqdm reads its defaults from the environment, once, when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", _LOG_INTERVAL)
        os.environ.setdefault("TQDM_MAXINTERVAL", _LOG_INTERVAL)
    try:
        from .app import app
        from .terminal import replace_unencodable
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("error: typer is not installed. Run: pip install 'hf-fwdattr[cli]'")
    replace_unencodable()
    app()
