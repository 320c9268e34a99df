"""Lowering for platforms that this machine may lack."""

import contextlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh

# What a kernel is lowered to.
KERNEL_CALLS = {"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}
# Newer versions of JAX ask which GPU a kernel is for.
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lowered_for(platform, fn, *args):
    """The program that `fn`, of `jax.jit`, is lowered to."""
    described = contextlib.nullcontext()
    if platform == "cuda":
        described = jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100))
    with described:
        return fn.trace(*args).lower(lowering_platforms=(platform,)).as_text()
