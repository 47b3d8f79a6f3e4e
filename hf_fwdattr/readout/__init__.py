"""How a query is read: forward passes along probes, two ways, with one signature."""

from . import difference, jvp


READOUTS = {"jvp": jvp.read, "difference": difference.read}
