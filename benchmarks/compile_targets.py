"""Compiles lifted functions and training steps for TPUs and GPUs that this machine lacks.

    python benchmarks/compile_targets.py [--quick | --all] [--only stack/v5e] [--keep FILE] [--json]

Needs libtpu for TPUs; for an H100 also jax-cuda13-plugin, jax-cuda13-pjrt and CUDA's ptxas; Qwix to
compile its programs too. Nothing runs: bytes of arguments and of temporaries, and the largest
buffer between fusions, are what the compiler decided. A training step's weights come with the
optimizer's state. The time is what the compiler predicts, which counts the body of a scan once:
compare it within a program only. Exits with 1 if a claim of `target_claims` fails.
"""

import argparse
import fnmatch
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import sys
import time

import hlo_dots
import hlo_tools
import jax
import qwix_programs
import target_claims
import target_programs as programs
import timing

AXES = ("data", "model")
TPUS = {
    "v5e": functools.partial(hlo_tools.tpu_mesh, "v5e", (1, 1), AXES),
    "v6e": functools.partial(hlo_tools.tpu_mesh, "v6e", (1, 1), AXES),
}
SLICE = {"v5e 2x2": functools.partial(hlo_tools.tpu_mesh, "v5e", (2, 2), AXES)}
# The 256 chips of a whole pod.
POD = {"v5e 16x16": functools.partial(hlo_tools.tpu_mesh, "v5e", (16, 16), AXES, "16x16")}
GPU = {"h100": functools.partial(hlo_tools.h100_mesh, (1, 1), AXES)}
GPUS = {"h100 x 8": functools.partial(hlo_tools.h100_mesh, (2, 4), AXES)}
BATCHES = (1, 8, 128, 1024, 4096)
# Where weights are compiled as [out, in], too, of square layers.
TRANSPOSED = (8, 1024)
# Where the stack is compiled at which batch, and where it is beside Qwix, if not everywhere.
BRIEFLY = dict.fromkeys(BATCHES, ("v5e",)) | {8: ("v5e", "v6e", "h100"), 1024: ("v5e", "h100")}
BESIDE = {8: ("v6e", "h100"), 1024: ("v5e", "h100")}


def plan(everything=True):
    """Cases: name -> (program, its weights, mesh); names are program/target/weights.

    Without `everything`, only v5e gets all batches, and rarer formats and [out, in] are left out.
    """
    everywhere = TPUS | SLICE | GPU
    main = [*programs.FORMATS, *programs.MORE, *programs.GROUPED]
    groups = []

    def chosen(briefly):
        return {k: mesh for k, mesh in (TPUS | GPU).items() if everything or k in briefly}

    for rows in BATCHES:
        formats = [*main, *programs.REST] if everything else main
        build = functools.partial(programs.stack, rows=rows)
        groups.append((f"stack of 4, batch {rows}", chosen(BRIEFLY[rows]), formats, build))
        if everything and rows in TRANSPOSED:
            build = functools.partial(programs.stack, rows=rows, transposed=True)
            title = f"stack of 4, [out, in], batch {rows}"
            groups.append((title, chosen(BRIEFLY[rows]), main, build))
        names = qwix_programs.names(everything)
        build = functools.partial(qwix_programs.unrolled, rows=rows)
        groups.append((f"beside Qwix, batch {rows}", chosen(BESIDE.get(rows, ())), names, build))
    weights = [*programs.FORMATS, "rank 256"]
    groups.append(("transformer blocks", TPUS | SLICE, weights, programs.blocks))
    in_kernels = functools.partial(programs.blocks, pallas=True)
    groups.append(("transformer blocks", GPU, weights, in_kernels))
    groups.append(("training step", everywhere, list(programs.TRAINED), programs.training))
    pod = functools.partial(programs.mlp_stack, rows=1024, width=8192, hidden=32768)
    groups.append(("MLP stack", POD, ["bfloat16", "int8"], pod))
    kernels = ["bfloat16", "int8", "int4 g128", "nf4 g128", "mxfp4", "int3"]
    groups.append(("MLP stack", GPUS, kernels, functools.partial(pod, pallas=True)))
    make = functools.partial(programs.mlp_stack_in_kernels, make_mesh=POD["v5e 16x16"])
    in_kernels = functools.partial(make, rows=4096, width=8192, hidden=32768)
    groups.append(("MLP stack in kernels", POD, ["nf4 g128", "mxfp4"], in_kernels))
    return {
        f"{name}/{target}/{w}": (functools.partial(build, w), w, mesh)
        for name, targets, all_weights, build in groups
        for target, mesh in targets.items()
        for w in all_weights
    }


def platform_of(target):
    """JAX's name of the platform that a target belongs to."""
    return "cuda" if target in GPU | GPUS else "tpu"


def missing(target, weights):
    """What has to be installed to compile a case, or None."""
    if weights.endswith(qwix_programs.QWIX) and not qwix_programs.installed():
        return "qwix"
    package = "jax_plugins.xla_cuda13" if platform_of(target) == "cuda" else "libtpu"
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    return None if found else package.rpartition(".")[2]


def measure(name, build, mesh):
    """Compiles one case."""
    title, target, weights = name.split("/")
    row = {"program": title, "target": target, "weights": weights}
    program, mesh = build(), mesh()
    args = programs.place(program, mesh)
    begin = time.perf_counter()
    compiled = hlo_tools.compile_for(program.fn, args, platform_of(target))
    row["compile_s"] = round(time.perf_counter() - begin, 1)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    batch = args[1].sharding.shard_shape(args[1].shape)
    batch_bytes = math.prod(batch) * args[1].dtype.itemsize
    row["argument_bytes"] = memory.argument_size_in_bytes
    row["weight_bytes"] = memory.argument_size_in_bytes - batch_bytes
    row["temporary_bytes"] = memory.temp_size_in_bytes
    largest = hlo_tools.largest_buffers(text, count=1)
    row["largest_buffer"] = describe(largest[0]) if largest else None
    row["largest_buffer_bytes"] = largest[0].size if largest else 0
    row["dots"] = hlo_dots.dot_types(text)
    if program.sizes:
        row["weight_copies"] = [describe(b) for b in copies_of(program, mesh, text)]
    if mesh.devices.size > 1:
        row["collectives"] = hlo_tools.collectives(text)
    # Below zero where the compiler has no model for some instruction; absent for GPUs.
    seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", -1)
    row["predicted_us"] = round(1e6 * seconds, 1) if seconds > 0 else None
    return row


def copies_of(program, mesh, hlo_text):
    """The buffers of the size of a device's share of a weight, in another type than it has.

    Where weights differ in size, an activation may be as large as half of the smallest one, so that
    only buffers of exactly one of the sizes count.
    """
    shards = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))["model"]
    sizes = {size // shards for size in program.sizes}
    large = hlo_tools.weight_copies(hlo_text, min(sizes), program.stored, program.packed)
    return [b for b in large if len(sizes) == 1 or math.prod(b.shape) in sizes]


def describe(buffer):
    """A buffer in a few words, such as `bf16[8,128] VMEM`."""
    return f"{buffer.dtype}[{','.join(map(str, buffer.shape))}] {buffer.space}"


def show(rows):
    """One table per program."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "180")  # A file has no width, and tables are wide.
    columns = (
        *("target", "weights", "weights MB", "ratio", "arguments MB", "ratio", "temp. MB"),
        *("largest buffer", "MB", "copies in HBM", "in VMEM", "dots", "predicted us"),
    )
    megabytes = lambda n: f"{n / 1e6:.2f}"
    for title, group in itertools.groupby(rows, key=lambda row: row["program"]):
        group = list(group)
        timing.show(
            title,
            columns,
            [
                (
                    row["target"],
                    row["weights"],
                    megabytes(row["weight_bytes"]),
                    row.get("weight_ratio", "-"),
                    megabytes(row["argument_bytes"]),
                    row.get("argument_ratio", "-"),
                    megabytes(row["temporary_bytes"]),
                    row["largest_buffer"],
                    megabytes(row["largest_buffer_bytes"]),
                    *copies_by_space(row),
                    ", ".join(row["dots"]) or "-",
                    "-" if row["predicted_us"] is None else row["predicted_us"],
                )
                for row in group
            ],
        )
        for row in group:
            if "collectives" in row:
                found = ", ".join(f"{k} {v}" for k, v in row["collectives"].items())
                print(f"collectives on {row['target']}, {row['weights']}: {found}")


def copies_by_space(row):
    """How many dense copies are in HBM, and how many in VMEM."""
    if "weight_copies" not in row:
        return "-", "-"
    return tuple(sum(c.endswith(s) for c in row["weight_copies"]) for s in ("HBM", "VMEM"))


def kept(path):
    """The cases that an earlier run has left in a file, by name."""
    if path is None or not path.exists():
        return {}
    return dict(json.loads(line) for line in path.read_text().splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="words of program/target/weights, or globs")
    parser.add_argument("--quick", action="store_true", help="the stack at batch 8 on v5e only")
    parser.add_argument("--all", action="store_true", help="every format, batch and target")
    parser.add_argument(
        "--keep",
        type=pathlib.Path,
        help="file of compiled cases: adds to it, and skips what it has",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    patterns = ["stack of 4, batch 8/v5e/*"] if args.quick else args.only or ["*"]
    known = plan(everything=args.all or bool(args.only))
    cases = {
        name: case
        for name, case in known.items()
        if any(fnmatch.fnmatchcase(name, p) or p in name for p in patterns)
    }
    if not cases:
        sys.exit(f"--only {' '.join(patterns)} matches none of:\n" + "\n".join(known))
    rows, absent, broken = [], {}, []
    had = kept(args.keep)
    for name, (build, weights, mesh) in cases.items():
        package = missing(target := name.split("/")[1], weights)
        if package:
            maker = "Qwix" if package == "qwix" else target
            absent[maker] = f"{package} is not installed"
            continue
        if name in had:
            rows.append(had[name])
            continue
        print(f"compiling {name}", file=sys.stderr, flush=True)
        try:
            rows.append(measure(name, build, mesh))
            if args.keep:
                with args.keep.open("a") as lines:
                    lines.write(json.dumps([name, rows[-1]]) + "\n")
        except jax.errors.JaxRuntimeError as error:
            broken.append(f"{', '.join(name.split('/'))}: {str(error).splitlines()[0]}")
    # What Qwix's programs do not compile to is no claim of ours.
    ours = [b for b in broken if f"{qwix_programs.QWIX}: " not in b]
    failed, above = target_claims.compare(rows)
    failed += ours
    if args.json:
        figures = {"rows": rows, "not_installed": absent, "not_compiled": broken}
        timing.emit(figures | {"failed": failed, "above_qwix": above})
    else:
        show(rows)
        for target, reason in absent.items():
            print(f"{target}: {reason}")
        for case in broken:
            print(f"NOT COMPILED {case}")
        for figure in above:
            print(f"above Qwix's {figure}")
        for claim in failed:
            print(f"FAILED {claim}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
