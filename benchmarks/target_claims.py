"""What is claimed of programs that were compiled for accelerators."""

import qwix_programs

# Bytes of a scanned stack's weights over those in bfloat16, at most.
RATIOS = {"int8": 0.51, "int4 g128": 0.28, "int2": 0.16}
# Never above Qwix's, but for what steps of rows in float32 take where Qwix's are bfloat16: vectors,
# and numbers, each of which a TPU gives 4 KB.
BESIDE = ("argument_bytes", "temporary_bytes", "largest_buffer_bytes")
SLACK = 2**18
# Codes that meet as they are stored, on TPUs; in a kernel, where several rows meet groups.
INTEGER_DOTS = {
    "int8 x int8": "s8 x s8",
    "int4 x int8": "s8 x s4",
    "int4 g128 x int8": "s8 x s4",
}


def compare(rows):
    """Adds to each row its ratios to the uncompressed program.

    Returns:
        The claims that fail, and where ours is above Qwix's within what is claimed.
    """
    base, failed, above = {}, [], []
    by_name = {(row["program"], row["target"], row["weights"]): row for row in rows}
    for row in rows:
        program, target, weights = (row[key] for key in ("program", "target", "weights"))
        first = base.setdefault((program, target), row)
        if first["weights"] in ("bfloat16", "float32"):
            for key in ("argument", "weight"):
                row[f"{key}_ratio"] = round(row[f"{key}_bytes"] / first[f"{key}_bytes"], 4)
        if weights.endswith(qwix_programs.QWIX):
            continue
        theirs = by_name.get((program, target, f"{weights}{qwix_programs.QWIX}"))
        where = f"{program}, {target}, {weights}"
        failed += [f"{where}: {claim}" for claim in _own(row)]
        for key, text in _beside(row, theirs):
            within = key != "argument_bytes" and row[key] <= theirs[key] + SLACK
            (above if within else failed).append(f"{where}: {text}")
    return failed, above


def _own(row):
    """The claims on one row that fail."""
    failed = []
    weights, on_tpu = row["weights"], not row["target"].startswith("h100")
    stacked = row["program"].startswith(("stack", "beside Qwix")) and weights != "bfloat16"
    gathered = [k for k in row.get("collectives", {}) if k.endswith("all-gather")]
    if gathered and "weight_copies" in row:
        failed.append(", ".join(gathered))
    ratio, limit = row.get("weight_ratio", 0), RATIOS.get(weights, 1)
    if stacked and ratio > limit:
        failed.append(f"{ratio} of bfloat16's bytes, not {limit}")
    if stacked and row["weight_copies"]:
        failed.append(f"dense copies {', '.join(row['weight_copies'])}")
    # A product with one row is no dot for XLA, but a reduction.
    multiplied = stacked and on_tpu and not row["program"].endswith("batch 1")
    expected = INTEGER_DOTS.get(weights) if multiplied else None
    in_kernel = " g" in weights and not row["dots"]
    if expected and not in_kernel and set(row["dots"]) != {expected}:
        failed.append(f"dots of {', '.join(row['dots'])}, not {expected}")
    return failed


def _beside(row, theirs):
    """The figures of a row that are above Qwix's, with what to say of them."""
    if theirs is None:
        return []
    text = lambda key: f"{key} {row[key]} ({row['largest_buffer']}), Qwix's {theirs[key]}"
    return [(key, text(key)) for key in BESIDE if row[key] > theirs[key]]
