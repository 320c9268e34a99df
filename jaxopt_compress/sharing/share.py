"""Weight sharing: entries take one of a few values, which training moves."""

import functools

import jax

from jaxopt_compress.compression import Compression, LeafMethod, compression_of, spelled
from jaxopt_compress.compression.keywords import answers
from jaxopt_compress.sharing.deciding import begin_sharing, share_again
from jaxopt_compress.sharing.options import Options, check_options, check_parameter
from jaxopt_compress.tree import Where

_ELSEWHERE = {
    **dict.fromkeys(("k", "n_clusters", "num_clusters", "number_of_clusters"), "write clusters="),
    **dict.fromkeys(("bits", "nbits", "n_bits"), "write clusters=2**bits"),
    **dict.fromkeys(
        ("cluster_centroids_init", "centroid_init", "initialization"),
        "write init='linear', 'density', 'kmeans++' or 'random'",
    ),
    **dict.fromkeys(
        ("d", "block_size", "subvector", "num_subquantizers"), "write vector=, entries per code"
    ),
    **dict.fromkeys(("num_codebooks", "stages", "n_codebooks"), "write codebooks="),
    **dict.fromkeys(("cluster_per_channel", "per_channel"), "write per='channel'"),
    **dict.fromkeys(("seed", "rng"), "write key=jax.random.key(seed)"),
}


@answers(_ELSEWHERE)
def share(
    clusters: int = 16,
    init: str | None = None,
    group_size: int | None = None,
    vector: int = 1,
    where: Where = None,
    *,
    codebooks: int = 1,
    per: str = "tensor",
    stack: int = 0,
    zero: bool | None = None,
    key: jax.Array | None = None,
    iterations: int = 50,
    centroid_dtype: str = "float32",
    begin: int = 0,
    every: int | None = None,
) -> Compression:
    r"""Gives entries one of a few values, found by k-means and trained.

    .. math::
        \hat w_i = c_{a(i)}, \qquad
        \frac{\partial L}{\partial c_k} = \sum_{i: a(i) = k} \frac{\partial L}{\partial \hat w_i}

    Centroids :math:`c` are learned parts: the optimizer ``compressed_training(..., learned=)``
    trains them. Which entry has which, :math:`a`, is fixed, and the parameter itself then gets no
    updates; or decided again ``every`` so many updates, from a parameter that is trained on by
    straight-through gradients. Entries under a mask of ``prune`` have no code: they are 0. Each
    entry of a stack has codebooks of its own.

    With ``stats``, k-means in ``init`` weights squared errors of entries by the Fisher information
    of ``jc.measures.fisher()`` if they have it, else by the second moment of their inputs.
    Updates have no statistics: k-means at ``begin``, and codes decided again ``every`` so many
    updates, count all entries alike.

    Args:
        clusters: Values per codebook, 2 to 65536. Codes take ``ceil(log2(clusters))`` bits.
        init: Where k-means begins: ``"linear"``, between the extremes, the default for numbers;
            ``"density"``, at quantiles, the default for vectors; ``"kmeans++"``; or ``"random"``.
        group_size: Consecutive entries along the last contracted axis that share a codebook, among
            all other entries; must divide the axis. By default all.
        vector: Consecutive entries along that axis that have one code together (product
            quantization); must divide the axis, or the group.
        codebooks: How many codes a vector has, each of a codebook of its own, whose centroids are
            added (additive quantization). By default 1.
        where: Which parameters; by default the floating ones of rank 2 and more, and where uses are
            given only those with a use.
        per: ``"tensor"``: one codebook for a parameter; ``"channel"``: one per output.
        stack: How many leading axes of each are a stack of parameters of their own, whatever uses
            say of them, such as the members of an ensemble under `jax.vmap`.
        zero: Whether the first centroid is 0 and stays there, so that entries of 0 do. By default
            for numbers that have no mask, and not for vectors and sums.
        key: A random key, for ``"kmeans++"`` and ``"random"``.
        iterations: The most iterations of k-means.
        centroid_dtype: What holds centroids: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        begin: The update after which entries share values; until then they are left as they are.
        every: After how many updates codes are decided again, by the nearest centroid.

    Returns:
        A `Compression` with learned parts, that stores `CodebookArray`, or a `SumArray` of them.

    Raises:
        ValueError: Options out of range; in ``init``: a parameter without an axis, groups or
            vectors that do not divide, or vectors or sums of a pruned parameter.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> params = {"w": jnp.array([[1.1, 0.0, -2.0, 0.9], [3.0, 1.0, 0.1, -2.2]])}
        >>> small = jc.compress(params, jc.share(clusters=4))
        >>> small["w"].materialize().round(2)
        Array([[ 1. ,  0. , -2.1,  1. ],
               [ 3. ,  1. ,  0. , -2.1]], dtype=float32)

    References:
        Han et al., 2016, Deep Compression. Gong et al., 2014, Compressing Deep Convolutional
        Networks using Vector Quantization. Choi et al., 2017, Towards the Limit of Network
        Quantization. Babenko and Lempitsky, 2014, Additive Quantization for Extreme Vector
        Compression. Egiazarian et al., 2024, Extreme Compression of Large Language Models via
        Additive Quantization.
    """
    if init is None:
        init = "linear" if vector == 1 else "density"
    options = Options(
        clusters,
        init,
        group_size,
        vector,
        codebooks,
        per,
        zero,
        key,
        iterations,
        centroid_dtype,
        begin,
        every,
    )
    check_options(options)
    asked = spelled(
        "share",
        clusters,
        init=init,
        group_size=group_size,
        vector=vector,
        where=where,
        codebooks=codebooks if codebooks > 1 else None,
        per=per,
        stack=stack or None,
        zero=zero,
        centroid_dtype=centroid_dtype,
    )
    method = LeafMethod(
        functools.partial(check_parameter, options),
        functools.partial(begin_sharing, options),
        functools.partial(share_again, options),
    )
    return compression_of(method, where, stack=stack, asked=asked)
