"""What a kernel is compiled for."""

from __future__ import annotations

import jax


def device_kind() -> str:
    """JAX's name of the device that the program being traced is for, such as "TPU v6 lite".

    That is the device of the abstract mesh where there is one, which may be a chip that is only
    described, and else the default device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described is not None else jax.devices()[0].device_kind
