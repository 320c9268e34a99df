"""Every row that the SmolLM2 example can be asked for is a compression, under a name of its own."""

import itertools

from examples import smollm2
from jaxopt_compress import Compression

DIFFERENT = (
    [],
    ["--group", "32"],
    ["--scales", "bfloat16"],
    ["--damping", "0.003"],
    ["--rank", "64"],
    ["--rotate", "stream"],
    ["--activations", "int8"],
    ["--calibrate", "8192"],
)


def test_every_row_is_a_compression():
    args = smollm2.arguments([])
    for name, format in itertools.product(smollm2.METHODS, smollm2.FORMATS):
        assert isinstance(smollm2.method(name, format, args), Compression)


def test_options_that_change_a_row_change_its_name():
    args = [smollm2.arguments(words) for words in DIFFERENT]
    names = [smollm2.row_name(a, "int3", "corrected") for a in args]
    assert len(set(names)) == len(names)
    assert len({smollm2.row_name(a, "int3", "nearest") for a in args}) == len(args) - 3
