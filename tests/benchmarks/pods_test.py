"""A model of 8 billion weights compiles for 256 chips, without one of them."""

import json

import pytest

from tests import tpu


@pytest.mark.slow
@tpu.needs_libtpu
def test_decoding_of_8b_holds_no_dense_weight():
    printed = tpu.python("benchmarks/pods.py", "--json", "--only", "decode/8B/v5e")
    (row,) = json.loads(printed)["rows"]
    assert row["fits"] and row["dense_weights"] == []
    # An eighth of weights of 4.25 bits and of the embedding; and the cache.
    assert row["argument_bytes"] < 0.8e9
