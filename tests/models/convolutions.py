"""Convolutions of one kernel: strides, groups, dilation and layouts."""

from jax import lax

from .case import conv
from .plain import plain


def _conv(name, numbers, x, w, use, strides=None, padding="SAME", **options):
    strides = strides or (1,) * (len(x) - 2)

    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["w"], strides, padding, dimension_numbers=numbers, **options
        )

    return plain(f"conv_{name}", fn, {"w": w}, x, {"w": [use]})


def _conv_transpose(params, x, transpose_kernel):
    return lax.conv_transpose(
        x,
        params["w"],
        strides=(2, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=transpose_kernel,
    )


CASES = [
    _conv(
        "strided",
        ("NHWC", "HWIO", "NHWC"),
        (2, 10, 12, 8),
        (3, 2, 8, 24),
        conv((-4, -3, -2), (-1,)),
        strides=(2, 3),
        padding=((1, 0), (2, 1)),
    ),
    _conv(
        "grouped",
        ("NCHW", "OIHW", "NCHW"),
        (2, 16, 6, 5),
        (24, 8, 3, 2),
        conv((-3, -2, -1), (-4,)),
        feature_group_count=2,
    ),
    _conv(
        "depthwise",
        ("NHWC", "HWIO", "NHWC"),
        (2, 6, 5, 16),
        (2, 4, 1, 32),
        conv((-4, -3, -2), (-1,)),
        feature_group_count=16,
    ),
    _conv(
        "batch_grouped",
        ("NHWC", "HWIO", "NHWC"),
        (4, 6, 5, 8),
        (3, 2, 8, 24),
        conv((-4, -3, -2), (-1,)),
        batch_group_count=2,
    ),
    _conv(
        "dilated",
        ("NHWC", "OHWI", "NHWC"),
        (2, 6, 7, 8),
        (24, 3, 2, 8),
        conv((-3, -2, -1), (-4,)),
        rhs_dilation=(1, 2),
    ),
    _conv(
        "channels_first_batch_last",
        ("CHWN", "IHWO", "CHWN"),
        (8, 6, 5, 2),
        (8, 3, 2, 24),
        conv((-4, -3, -2), (-1,)),
    ),
    _conv("one_dimensional", ("NWC", "WIO", "NWC"), (2, 9, 16), (3, 16, 24), conv((-3, -2), (-1,))),
    _conv(
        "input_dilated",
        ("NHWC", "HWOI", "NHWC"),
        (2, 4, 5, 8),
        (3, 2, 24, 8),
        conv((-4, -3, -1), (-2,)),
        padding=((2, 1), (1, 1)),
        lhs_dilation=(2, 2),
    ),
    plain(
        "conv_transpose",
        lambda p, x: _conv_transpose(p, x, False),
        {"w": (3, 2, 8, 24)},
        (2, 4, 5, 8),
        {"w": [conv((-4, -3, -2), (-1,))]},
    ),
    # The gradient of a convolution from 24 to 8 channels: its kernel is mirrored in space.
    plain(
        "conv_transpose_kernel",
        lambda p, x: _conv_transpose(p, x, True),
        {"w": (3, 2, 24, 8)},
        (2, 4, 5, 8),
        {"w": [conv((-4, -3, -1), (-2,))]},
    ),
]
