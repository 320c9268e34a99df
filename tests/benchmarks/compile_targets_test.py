"""Four layers of int8 weights compile for a TPU without a dense copy of any of them."""

import doctest
import importlib.util
import json

import pytest

from tests import tpu


@pytest.mark.slow
@tpu.needs_libtpu
def test_int8_stack_streams_on_v5e():
    names = [f"stack of 4, batch 8/v5e/{weights}" for weights in ("bfloat16", "int[8]")]
    printed = tpu.python("benchmarks/compile_targets.py", "--json", "--only", *names)
    dense, int8 = json.loads(printed)["rows"]
    assert int8["weight_copies"] == []
    assert int8["argument_bytes"] <= 0.51 * dense["argument_bytes"]
    assert int8["temporary_bytes"] <= dense["temporary_bytes"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, tpu.ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hlo_tools", "hlo_dots"])
def test_reading_of_compiled_programs(name):
    failed, attempted = doctest.testmod(load(name))
    assert attempted and not failed


# A weight that is prefetched in two slices, its codes unpacked, and a product in a fusion.
HLO = """\
%fused (p: s8[8,64], w: s4[64,32]) -> s32[8,32] {
  %p = s8[8,64]{1,0} parameter(0)
  %w = s4[64,32]{1,0:E(4)} parameter(1)
  %wide = s8[64,32]{1,0} convert(%w)
  ROOT %dot.1 = s32[8,32]{1,0} convolution(%p, %wide), dim_labels=bf_io->bf
}

ENTRY %main (x: s8[8,64], w: u8[16,32]) -> s32[8,32] {
  %x = s8[8,64]{1,0} parameter(0)
  %half.1 = u8[8,32]{1,0:S(1)} slice-done(%s.1)
  %half.2 = u8[8,32]{1,0:S(1)} slice-done(%s.2)
  %both = u8[16,32]{1,0:S(1)} custom-call(%half.1, %half.2), custom_call_target="ConcatBitcast"
  %codes = u8[64,32]{1,0:S(1)} fusion(%both), kind=kLoop, calls=%unpacking
  %y = (f32[8,32]{1,0}, s8[64]{0}) custom-call(%x, %codes), custom_call_target="__cublas$gemm"
  ROOT %z = s32[8,32]{1,0} fusion(%x, %codes), kind=kOutput, calls=%fused
}
"""


def test_views_of_prefetches_are_no_buffers():
    names = [b.name for b in load("hlo_tools").largest_buffers(HLO)]
    assert "both" not in names and names[0] == "codes"


def test_unpacked_codes_are_copies_at_the_stored_type_too():
    copies = load("hlo_tools").weight_copies
    assert copies(HLO, 64 * 32, "u8") == []
    assert [b.name for b in copies(HLO, 64 * 32, "u8", packed=True)] == ["codes"]


def test_operands_of_products_in_fusions_and_libraries():
    assert load("hlo_dots").dot_types(HLO) == {"s8 x s8": 1, "s8 x u8": 1}
