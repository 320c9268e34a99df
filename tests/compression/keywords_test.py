"""Keywords of other tools are answered with ours."""

import inspect

import pytest

import jaxopt_compress as jc


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jc.quantize(bits=4), r"quantize\(\) has no argument bits=: .*quantize\('int4'\)"),
        (lambda: jc.quantize("int4", group=32), "group=: write group_size="),
        (lambda: jc.quantize("int4", tile_size=32), "tile_size=: write group_size="),
        (lambda: jc.quantize("int4", act="int8"), "act=: write activations='int8'"),
        (lambda: jc.quantize("int4", per_channel=True), "per_channel=: write per='channel'"),
        (lambda: jc.quantize("int4", gradients="int8"), "gradients=: write backward="),
        (lambda: jc.quantize("int4", symetric=True), "did you mean symmetric="),
        (lambda: jc.quantize("int4", zzz=1), "zzz=: it takes format, group_size"),
        (lambda: jc.lsq("int4", bits=4), "bits=: the format says it"),
        (lambda: jc.dorefa("odd2", inputs="uint4"), "inputs=: write activations="),
        (lambda: jc.quantize_array(1, "int8", block_size=4), "block_size=: write group_size="),
        (lambda: jc.prune(sparsity=0.5), r"sparsity=: the schedule says it"),
        (lambda: jc.prune(jc.scores.magnitude(), n=2, m=4), "=: write pattern='2:4'"),
        (lambda: jc.low_rank(r=4), "r=: write rank="),
        (lambda: jc.low_rank(compression_ratio=2), "compression_ratio=: write ratio="),
    ],
)
def test_what_to_write(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("fn", [jc.quantize, jc.lsq, jc.dorefa, jc.prune, jc.low_rank])
def test_signatures_stay_readable(fn):
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())
