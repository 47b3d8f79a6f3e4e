"""Accelerators: ways of sharing a model or its rows among processes that cannot be recorded."""

from typing import Any

from ..errors import UnsupportedError


__all__ = ["refuse_accelerator"]


def refuse_accelerator(accelerator: Any) -> None:
    """Refuse ways of sharing a model or its rows in which no rank sees single weights or rows.

    Raises:
        UnsupportedError: FSDP1, FSDP with offloading, tensor, context or sequence parallelism.
    """
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UnsupportedError(
            f"fsdp_version={plugin.fsdp_version}: it flattens weights, so they cannot be told apart (FSDP1). Set "
            "fsdp_config={'version': 2}"
        )
    if type(getattr(plugin, "cpu_offload", None)).__name__ == "CPUOffloadPolicy":
        raise UnsupportedError(
            "cpu_offload of FSDP: weights and their gradients move while they are read, which was never tried with "
            "responses. Set it to False"
        )
    layout = getattr(accelerator, "parallelism_config", None)
    if layout is not None and layout.non_data_parallel_size > 1:
        raise UnsupportedError(
            f"parallelism_config: {layout.non_data_parallel_size} ranks share every row (tensor, context or sequence "
            "parallelism), and no rank has a row's gradient. Set their sizes to 1"
        )
