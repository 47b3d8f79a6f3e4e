"""The command line: `hf-fwdattr demo | build | attribute | inspect`."""

from .app import app


__all__ = ["app"]
