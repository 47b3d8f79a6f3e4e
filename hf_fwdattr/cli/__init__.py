"""The command line: `hf-fwdattr demo | build | attribute | evaluate | inspect | push`."""

from .app import app


__all__ = ["app"]
