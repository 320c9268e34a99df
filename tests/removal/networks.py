"""Networks of several libraries, which know nothing of removal."""

import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp

from tests.removal import law

KEY = jax.random.key
IMAGE = (2, 8, 8, 3)


def linen(module, shape, dtype=jnp.float32):
    x = law.values(jax.ShapeDtypeStruct(shape, dtype)) if dtype == jnp.float32 else None
    x = jax.random.randint(KEY(0), shape, 0, 11) if x is None else x
    return module.apply, jax.eval_shape(module.init, KEY(1), x), x


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(3)(nn.gelu(nn.Dense(12)(x)))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(True)(nn.Conv(6, (3, 3))(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3)(nn.relu(nn.Dense(10)(x)))


class Residual(nn.Module):
    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        conv = lambda k, s: nn.Conv(self.channels, (k, k), (s, s), use_bias=False)
        y = nn.BatchNorm(True)(conv(3, 1)(nn.relu(nn.BatchNorm(True)(conv(3, self.stride)(x)))))
        if y.shape != x.shape:
            x = nn.BatchNorm(True)(conv(1, self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (3, 3))(x)))
        for block in (Residual(8), Residual(12, 2), Residual(12)):
            x = block(x)
        return nn.Dense(3)(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(8, (3, 3))(x))
        b = nn.relu(nn.Conv(12, (3, 3), (2, 2))(a))
        c = nn.ConvTranspose(10, (2, 2), (2, 2))(b)
        return nn.Conv(3, (3, 3))(jnp.concatenate([a, c], -1))


class Depthwise(nn.Module):
    """Depthwise with a multiplier, squeeze and excite, and a grouped convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.BatchNorm(True)(nn.Conv(8, (1, 1))(x)))
        x = nn.silu(nn.BatchNorm(True)(nn.Conv(16, (3, 3), feature_group_count=8)(x)))
        gate = nn.sigmoid(nn.Dense(16)(nn.relu(nn.Dense(5)(x.mean((1, 2))))))
        x = nn.Conv(12, (1, 1))(x * gate[:, None, None])
        y = nn.relu(nn.Conv(12, (3, 3), feature_group_count=3)(x))
        return nn.Dense(3)(y.mean((1, 2)))


class Block(nn.Module):
    norm: type = nn.LayerNorm

    @nn.compact
    def __call__(self, x, _=None):
        h = self.norm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(self.norm()(x)))), None


class LM(nn.Module):
    """A transformer with tied embeddings."""

    scan: bool = False
    norm: type = nn.LayerNorm
    depth: int = 1

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16)
        x = embed(tokens) + self.param("pos", nn.initializers.normal(), (5, 16))
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            x, _ = nn.scan(nn.remat(Block), **axes)(norm=self.norm)(x, None)
        else:
            for _ in range(self.depth):
                x, _ = Block(norm=self.norm)(x)
        return embed.attend(self.norm()(x))


class Gated(nn.Module):
    """Grouped queries, rotary halves, fused keys and values, a fused gate."""

    @nn.compact
    def __call__(self, x):
        n, t, _ = x.shape
        heads, groups, size = 4, 2, 8
        x = nn.Dense(16)(x)
        h = nn.RMSNorm()(x)
        q = nn.Dense(heads * size, use_bias=False)(h).reshape(n, t, heads, size)
        kv = nn.Dense(2 * groups * size, use_bias=False)(h)
        k, v = (z.reshape(n, t, groups, size) for z in jnp.split(kv, 2, -1))
        angle = jnp.arange(t)[:, None] * 1e4 ** (-jnp.arange(0, size, 2) / size)
        cos, sin = (jnp.concatenate([f(angle)] * 2, -1)[None, :, None] for f in (jnp.cos, jnp.sin))
        half = size // 2
        turn = lambda z: z * cos + jnp.concatenate([-z[..., half:], z[..., :half]], -1) * sin
        k, v = (jnp.repeat(z, heads // groups, axis=2) for z in (turn(k), v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", turn(q), k) / size**0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(n, t, -1)
        x = x + nn.Dense(16, use_bias=False)(out)
        gate, up = jnp.split(nn.Dense(40)(nn.RMSNorm()(x)), 2, -1)
        return nn.Dense(3)(x + nn.Dense(16)(nn.silu(gate) * up))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(12))(x)
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(10))(x))


def nnx_attention():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
            self.n, self.i = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(8, 16, rngs=rngs)
            self.o = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            x = self.i(x)
            return self.o(x + self.a(self.n(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, law.values(jnp.ones((2, 5, 8)))


def equinox_transformer():
    class Net(eqx.Module):
        i: eqx.nn.Linear
        a: eqx.nn.MultiheadAttention
        n: eqx.nn.LayerNorm
        m: eqx.nn.MLP
        o: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.i, self.n = eqx.nn.Linear(8, 16, key=keys[0]), eqx.nn.LayerNorm(16)
            self.a = eqx.nn.MultiheadAttention(4, 16, use_query_bias=True, key=keys[1])
            self.m = eqx.nn.MLP(16, 16, 24, 2, key=keys[2])
            self.o = eqx.nn.Linear(16, 3, key=keys[3])

        def __call__(self, x):
            x = jax.vmap(self.i)(x)
            h = jax.vmap(self.n)(x)
            x = x + self.a(h, h, h)
            return jax.vmap(self.o)(x + jax.vmap(self.m)(x))

    params, static = eqx.partition(Net(KEY(0)), eqx.is_inexact_array)
    return lambda p, x: eqx.combine(p, static)(x), params, law.values(jnp.ones((5, 8)))


def experts():
    def fn(p, x):
        gate = jax.nn.softmax(x @ p["g"])
        h = jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["w"]))
        return jnp.einsum("bef,efd,be->bd", h, p["v"], gate)

    shapes = {"g": jnp.ones((8, 4)), "v": jnp.ones((4, 12, 8)), "w": jnp.ones((4, 8, 12))}
    return fn, shapes, law.values(jnp.ones((4, 8)))


def vision(layout):
    """A vision transformer whose queries, keys and values are one product, reshaped as named."""
    heads, size, width = 3, 4, 10

    def fn(p, images):
        n = len(images)
        patches = images.reshape(n, 4, 2, 4, 2).swapaxes(2, 3).reshape(n, 16, 4) @ p["patch"]
        first = jnp.broadcast_to(p["cls"], (n, 1, width))
        x = jnp.concatenate([first, patches], 1) + p["position"]
        sizes = {"k": 3, "h": heads, "d": size}
        qkv = (x @ p["qkv"]).reshape(n, 17, *(sizes[k] for k in layout))
        q, k, v = jnp.einsum(f"nt{layout}->knhtd", qkv)
        scores = jax.nn.softmax(jnp.einsum("nhid,nhjd->nhij", q, k) / size**0.5)
        out = jnp.einsum("nhij,nhjd->nihd", scores, v).reshape(n, 17, heads * size)
        x = x + out @ p["out"]
        return (x + jax.nn.gelu(x @ p["up"]) @ p["down"])[:, 0] @ p["head"]

    shapes = {
        "cls": (1, 1, width), "down": (14, width), "head": (width, 5), "out": (12, width),
        "patch": (4, width), "position": (1, 17, width), "qkv": (width, 36), "up": (width, 14),
    }  # fmt: skip
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return fn, params, law.values(jnp.ones((2, 8, 8)))
