"""Compile for accelerators that this machine lacks, and read what the compiler made of it.

Nothing here runs a program: libtpu and the CUDA plugin compile for a described topology. The
predicted times of such compiles mislead, buffers do not, so `largest_buffers` lists what the
optimized HLO really materializes between fusions, in HBM and in VMEM.

Let one process at a time use libtpu: it holds a lock file.
"""

import functools
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

# Read when libtpu, or the CUDA plugin, is loaded.
TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
GPU_FLAGS = "--xla_gpu_cuda_data_dir=/usr/local/cuda --xla_gpu_autotune_level=0"
H100_TARGET = pathlib.Path(__file__).with_name("h100_target.txtpb")


@functools.cache
def tpu_mesh(generation, shape=(1,), axis_names=("x",), slice_shape="2x2"):
    """Returns a mesh of described TPU chips, the same devices at each call.

    Args:
      generation: `"v5e"` or `"v6e"`.
      shape: the mesh's shape, of no more devices than the slice has.
      axis_names: one name per axis.
      slice_shape: the slice that is described, such as `"2x2"` or `"16x16"`.
    """
    os.environ.update({k: v for k, v in TPU_ENV.items() if k not in os.environ})
    name = f"{generation}:{slice_shape}"
    topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
    return _mesh(topology.devices, shape, axis_names)


def h100_mesh(shape=(1,), axis_names=("x",)):
    """Returns a mesh of described H100s of one host; needs the CUDA plugin and its `ptxas`."""
    flags = os.environ.get("XLA_FLAGS", "")
    if GPU_FLAGS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {GPU_FLAGS}".strip()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        target_config=H100_TARGET.read_text(),
        topology=f"1x1x{math.prod(shape)}",
    )
    return _mesh(topology.devices, shape, axis_names)


def _mesh(devices, shape, axis_names):
    count = int(np.prod(shape))
    return Mesh(np.asarray(devices[:count], dtype=object).reshape(shape), axis_names)


def compile_for(fn, args, platform, **jit_options):
    """Compiles `fn` for the devices that the arguments' shardings name.

    Args:
      fn: a function of arrays.
      args: a tuple of pytrees of `jax.ShapeDtypeStruct`, each with a sharding on a described mesh.
      platform: `"tpu"` or `"cuda"`.
      **jit_options: passed to `jax.jit`.

    Returns:
      The compiled object: `memory_analysis()`, `as_text()`.
    """
    traced = jax.jit(fn, **jit_options).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).compile()


def dumped(folder):
    """Options of a compiler that writes the optimized program into a folder, for `text_of`."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def text_of(compiled, folder):
    """The optimized program, which libtpu 0.0.52 cannot always hand over, though it runs.

    Args:
      compiled: what `compile_for` returned, with the options of `dumped`.
      folder: the folder of these.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        texts = list(pathlib.Path(folder).glob("*.after_optimizations.txt"))
        return max(texts, key=lambda path: path.stat().st_size).read_text()


class Buffer(NamedTuple):
    """One array that the optimized program materializes.

    Attributes:
      size: bytes as stored on the device, without tiling's padding.
      dtype: HLO's name, such as `bf16`, `s4`.
      shape: dimensions.
      space: `"HBM"` or `"VMEM"`.
      opcode: the instruction's opcode.
      name: the instruction's name.
      computation: the computation that holds it, such as the entry or a loop's body.
      prefetch: whether it is an asynchronous copy of something that already exists.
    """

    size: int
    dtype: str
    shape: tuple[int, ...]
    space: str
    opcode: str
    name: str
    computation: str
    prefetch: bool


_BITS = {"pred": 8, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Instructions whose result is a view of, or bookkeeping for, buffers made elsewhere.
_ALIASES = frozenset(
    "parameter get-tuple-element tuple bitcast while conditional call optimization-barrier "
    "after-all async-update copy-start slice-start partition-id replica-id".split()
)
_PREFETCHES = frozenset("copy-done slice-done async-done".split())
# One view of the slices in which an operand was copied asynchronously.
_JOINED = 'custom_call_target="ConcatBitcast"'


def largest_buffers(hlo_text, *, count=10, min_size=0, prefetches=False):
    """Lists the largest buffers that a compiled program materializes between fusions.

    Walks the entry computation and everything that it runs as separate instructions (loop bodies,
    branches, calls), not the inside of fusions, whose values live in registers. Arguments, views
    and tuples are left out.

    Args:
      hlo_text: `compiled.as_text()`.
      count: how many to return; None means all.
      min_size: the smallest size of interest, in bytes.
      prefetches: whether to list asynchronous copies too. Those move an operand closer to the
        compute unit, at its own dtype, and are how a compressed weight streams.

    Returns:
      A list of `Buffer`, largest first.

    Example:
      >>> hlo = '''ENTRY %main (p: bf16[8,4]) -> f32[8,4] {
      ...   %p = bf16[8,4]{1,0} parameter(0)
      ...   ROOT %c = f32[8,4]{1,0:T(8,128)S(1)} fusion(%p), kind=kLoop, calls=%f
      ... }'''
      >>> [(b.size, b.dtype, b.shape, b.space) for b in largest_buffers(hlo)]
      [(128, 'f32', (8, 4), 'VMEM')]
    """
    computations, entry = _computations(hlo_text)
    found, seen, pending = [], set(), [entry]
    while pending:
        name = pending.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for instruction in computations[name]:
            found.extend(_buffers(instruction, name))
            pending.extend(_called(instruction))
    keep = [b for b in found if b.size >= min_size and (prefetches or not b.prefetch)]
    return sorted(keep, key=lambda b: -b.size)[:count]


def weight_copies(hlo_text, elements, stored, packed=False):
    """Lists buffers that hold as many elements as a weight, in a type other than the stored one.

    A slice of a stacked weight at its stored type is the compressed weight itself on its way to the
    compute unit; anything else of that many elements is a dense or unpacked copy. Choose shapes in
    which no activation is as large as half a weight.

    Args:
      hlo_text: `compiled.as_text()`.
      elements: number of elements of one weight. Buffers of half as many count as copies too, so
        that a weight written in two parts is seen.
      stored: HLO's name of the stored type, such as `s4`.
      packed: whether the stored form packs several elements into each of its entries, so that even
        at its type as many entries as elements are an unpacked copy.

    Returns:
      A list of `Buffer`, largest first; empty if the weight streams.
    """
    buffers = largest_buffers(hlo_text, count=None)
    # What a GPU's library asks for as a workspace is one flat run of bytes.
    flat = lambda b: b.opcode == "custom-call" and len(b.shape) == 1
    large = [b for b in buffers if 2 * np.prod(b.shape) >= elements and not flat(b)]
    return [b for b in large if b.dtype != stored or (packed and np.prod(b.shape) >= elements)]


_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
)


def collectives(hlo_text):
    """Sums the bytes that each kind of collective produces, loops counted once.

    Args:
      hlo_text: `compiled.as_text()`.

    Returns:
      A dict from `dtype opcode`, such as `"bf16 all-reduce"`, to bytes.

    Example:
      >>> hlo = '''ENTRY %main (p: bf16[8,4]) -> bf16[16,4] {
      ...   %p = bf16[8,4]{1,0} parameter(0)
      ...   ROOT %g = bf16[16,4]{1,0} all-gather(%p), dimensions={0}
      ... }'''
      >>> collectives(hlo)
      {'bf16 all-gather': 128}
    """
    total = {}
    for instructions in _computations(hlo_text)[0].values():
        for _, type_text, opcode, _ in instructions:
            kind = _COLLECTIVE.fullmatch(opcode)
            if not kind:
                continue
            found = [
                (np.prod([int(d) for d in dims.split(",") if d]) * _bits(dtype) // 8, dtype)
                for dtype, dims, _ in _ARRAY.findall(type_text)
            ]
            # The asynchronous forms hold their operand too.
            for size, dtype in [max(found)] if opcode.endswith("-start") else found:
                key = f"{dtype} {kind[1]}"
                total[key] = total.get(key, 0) + int(size)
    return total


def _computations(hlo_text):
    computations, entry, current = {}, None, None
    for line in hlo_text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            computations[current].append((match[1], *_split_type(match[2])))
    return computations, entry


def _split_type(text):
    """Splits `type opcode(...)`; a tuple's type is in parentheses and may nest."""
    if text.startswith("("):
        depth, end = 1, 1
        while depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
    else:
        end = text.index(" ")
    rest = text[end:].strip()
    return text[:end], rest.split("(", 1)[0], rest


def _called(instruction):
    _, _, opcode, rest = instruction
    names = [name for branch in _BRANCHES.findall(rest) for name in re.findall(r"[\w.\-]+", branch)]
    for role, name in _CALLED.findall(rest):
        inlined = opcode == "fusion" or (role == "to_apply" and opcode != "call")
        if not inlined:
            names.append(name)
    return names


def _buffers(instruction, computation):
    name, type_text, opcode, rest = instruction
    if opcode in _ALIASES or opcode.endswith("-start"):
        return
    prefetch = opcode in _PREFETCHES or _JOINED in rest
    for dtype, dims, layout in _ARRAY.findall(type_text):
        shape = tuple(int(d) for d in dims.split(",") if d)
        space = "VMEM" if "S(1)" in layout else "HBM"
        size = int(np.prod(shape, dtype=np.int64)) * _bits(dtype) // 8
        yield Buffer(size, dtype, shape, space, opcode, name, computation, prefetch)


def _bits(dtype):
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"[0-9]+", dtype)[0])
