"""What Qwix does with models and weights that it was not made for, as docs/beside_others.md says.

    pip install qwix==0.1.8 && python benchmarks/qwix_limits.py

Each line is a case and what came of it. Qwix is no dependency.
"""

import importlib.metadata

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import qwix

X = jnp.linspace(-1.0, 1.0, 4 * 16).reshape(4, 16)
RULE = {"module_path": ".*", "weight_qtype": "int4"}


def made(model):
    """Whether Qwix takes a model: "taken", or its error."""
    try:
        qwix.quantize_model(model, qwix.PtqProvider([qwix.QuantizationRule(**RULE)]))
    except Exception as error:  # All that it raises is the answer.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return "taken"


class Layer(nn.Module):
    """A dense layer as the body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(16, use_bias=False)(x)), None


class Stack(nn.Module):
    """Three layers, scanned."""

    @nn.compact
    def __call__(self, x):
        scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers = nn.scan(Layer, length=3, **scan)
        return layers()(x, None)[0]


class Product(nn.Module):
    """A layer that is written as a product."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (16, 8))


def scanned():
    """Whether a model runs on what `quantize_params` makes of the weights of scanned layers."""
    rule = qwix.QuantizationRule(**RULE)
    params = Stack().init(jax.random.key(0), X)["params"]
    try:
        quantized = qwix.quantize_model(Stack(), qwix.PtqProvider([rule]))
        wanted = jax.eval_shape(quantized.init, jax.random.key(0), X)["params"]
        quantized.apply({"params": qwix.quantize_params(params, wanted)}, X)
    except Exception as error:  # All that it raises is the answer.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return "runs"


def traced_before(float_first):
    """Whether a model that trains in int4 differs from the float one."""
    jax.clear_caches()
    model = Product()
    params = model.init(jax.random.key(0), X)
    quantized = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**RULE)]))
    dense = jax.jit(model.apply)(params, X) if float_first else None
    if not float_first:
        jax.clear_caches()
    found = jax.jit(quantized.apply)(params, X)
    jax.clear_caches()
    dense = jax.jit(model.apply)(params, X) if dense is None else dense
    return "not quantized" if bool(jnp.all(found == dense)) else "quantized"


def main():
    """Prints the cases."""
    print(f"qwix {importlib.metadata.version('qwix')}, jax {jax.__version__}")
    layers = eqx.nn.MLP(16, 8, width_size=16, depth=1, key=jax.random.key(0))
    cases = {
        "linen": made(Stack()),
        "a plain function": made(lambda params, x: x @ params),
        "Equinox": made(layers),
        "Haiku": made(hk.transform(lambda x: hk.Linear(8)(x))),
        "quantize_params, scanned layers": scanned(),
        "x @ w, quantized model traced first": traced_before(False),
        "x @ w, float model traced first": traced_before(True),
    }
    for case, found in cases.items():
        print(f"{case}: {found}")


if __name__ == "__main__":
    main()
