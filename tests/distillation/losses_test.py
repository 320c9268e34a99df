"""Distillation losses against NumPy and SciPy, and the laws that they obey."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

import jaxopt_compress as jc

d = jc.distillation
RNG = np.random.default_rng(0)
S, T = (RNG.normal(size=(6, 5, 10)).astype(np.float32) * 3 for _ in range(2))
LABELS = RNG.integers(0, 10, (6, 5))
FEATURES = [RNG.normal(size=(7, n)).astype(np.float32) for n in (8, 12)]
OUTPUTS = {
    "soft_targets": d.soft_targets,
    "reverse_kl": d.reverse_kl,
    "jensen_shannon": d.jensen_shannon,
    "decoupled": lambda s, t: d.decoupled(s, t, LABELS),
    "top_k": lambda s, t: d.top_k(s, d.keep_top_k(t, 4)),
}
RELATIONS = {
    "attention": d.attention_transfer,
    "distances": d.relational_distances,
    "angles": d.relational_angles,
    "projected": lambda s, t: d.projected(s, t, d.projection(jax.random.key(0), 8, 12)),
    "contrastive": lambda s, t: d.contrastive(s @ jnp.ones((8, 12)) + s[:, :1], t),
}


def kl(p, q):
    return rel_entr(p, q).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergences_equal_scipy(temperature):
    s, t = (softmax(x.astype(float) / temperature, -1) for x in (S, T))
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=3e-5)
    close(d.soft_targets(S, T, temperature), temperature**2 * kl(t, s))
    close(d.reverse_kl(S, T, temperature), temperature**2 * kl(s, t))
    for w in (0.5, 0.1):
        m = w * t + (1 - w) * s
        want = temperature**2 * (w * kl(t, m) + (1 - w) * kl(s, m))
        close(d.jensen_shannon(S, T, w, temperature), want)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_parts_add_up_to_soft_targets(temperature):
    """With the teacher's probability of all others as the second weight (equation 7)."""
    others = 1 - np.take_along_axis(
        softmax(T.astype(float) / temperature, -1), LABELS[..., None], -1
    )
    parts = [d.decoupled(S, T, LABELS, *w, temperature) for w in ((1.0, 0.0), (0.0, 1.0))]
    whole = parts[0] + others[..., 0] * np.asarray(parts[1], float)
    np.testing.assert_allclose(whole, d.soft_targets(S, T, temperature), rtol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("name", OUTPUTS)
def test_zero_for_the_teacher_itself_positive_for_others_and_constant_in_it(name):
    loss = OUTPUTS[name]
    np.testing.assert_allclose(loss(T, T), 0, atol=1e-5)
    assert np.all(np.asarray(loss(S, T)) > 0)
    assert loss(S, T).shape == S.shape[:-1]
    assert loss(S.astype(jnp.bfloat16), T.astype(jnp.bfloat16)).dtype == jnp.float32
    to_teacher = jax.grad(lambda t: loss(S, t).sum())(T)
    np.testing.assert_array_equal(to_teacher, 0)
    to_student = jax.grad(lambda s: loss(s, T).sum())(S)
    assert np.all(np.isfinite(to_student)) and np.any(to_student != 0)
    # Shifts of logits change no probability.
    np.testing.assert_allclose(loss(S + 7, T - 3), loss(S, T), rtol=1e-3, atol=1e-5)


def test_gradients_of_soft_targets_are_differences_of_probabilities():
    got = jax.grad(lambda s: d.soft_targets(s, T, 2.0).sum())(S)
    want = 2.0 * (softmax(S.astype(float) / 2, -1) - softmax(T.astype(float) / 2, -1))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_top_k_is_exact_with_all_classes_and_below_otherwise():
    whole = d.soft_targets(S, T, 2.0)
    kept = [d.top_k(S, d.keep_top_k(T, k, 2.0), 2.0) for k in (1, 3, 9, 10)]
    np.testing.assert_allclose(kept[-1], whole, rtol=1e-5)
    np.testing.assert_allclose(kept[-2], whole, rtol=1e-4)
    for few, more in itertools.pairwise(kept):
        assert np.all(np.asarray(few) <= np.asarray(more) + 1e-5)
    # A log-sum inequality in float64.
    p, q = (softmax(x.astype(float) / 2, -1) for x in (T, S))
    order = np.argsort(-p, -1)[..., :3]
    p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
    rest = rel_entr(1 - p.sum(-1), 1 - q.sum(-1))
    np.testing.assert_allclose(kept[1], 4 * (kl(p, q) + rest), rtol=1e-4)


def test_a_teacher_without_doubt_leaves_no_nan():
    """Probabilities of exactly 0 and 1."""
    sure = jnp.where(jnp.arange(10) == 3, 0.0, -jnp.inf)[None]
    for loss in (d.soft_targets, lambda s, t: d.top_k(s, d.keep_top_k(t, 1))):
        value, slope = jax.value_and_grad(lambda s, f=loss: f(s, sure).sum())(S[0, :1])
        assert np.isfinite(value) and np.all(np.isfinite(slope))
    want = -log_softmax(S[0, 0].astype(float))[3]
    np.testing.assert_allclose(d.soft_targets(S[0, :1], sure, 1.0), want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", RELATIONS)
def test_relations_are_constant_in_the_teacher_and_finite_at_equal_examples(name):
    loss = lambda s, t: jnp.sum(RELATIONS[name](s, t))
    s, t = map(jnp.asarray, FEATURES)
    np.testing.assert_array_equal(jax.grad(loss, 1)(s, t), 0)
    assert np.any(np.asarray(jax.grad(loss)(s, t)) != 0)
    same = jnp.zeros_like(s).at[0].set(s[0])  # Rows that are equal, and rows of zeros.
    assert np.all(np.isfinite(jax.grad(loss)(same, t)))


def test_relations_against_loops():
    s, t = (x.astype(float) for x in FEATURES)
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    distance = lambda x: {(i, j): np.linalg.norm(x[i] - x[j]) for i, j in pairs}
    relative = lambda x: {
        k: v / np.mean(list(distance(x).values())) for k, v in distance(x).items()
    }
    huber = lambda x: 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5
    a, b = relative(s), relative(t)
    want = np.mean([huber(a[k] - b[k]) for k in pairs])
    np.testing.assert_allclose(d.relational_distances(*FEATURES), want, rtol=1e-4)
    unit = lambda v: v / np.linalg.norm(v)
    cosine = lambda x, i, j, k: unit(x[i] - x[j]) @ unit(x[k] - x[j])
    triples = [(i, j, k) for i, j in pairs for k in range(n) if k not in (i, j)]
    want = np.mean([huber(cosine(s, *k) - cosine(t, *k)) for k in triples])
    np.testing.assert_allclose(d.relational_angles(*FEATURES), want, rtol=1e-4)


def test_invariances():
    s, t = map(jnp.asarray, FEATURES)
    turned = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (8, 8)))[0]
    for loss in (d.relational_distances, d.relational_angles):
        np.testing.assert_allclose(loss(3 * s @ turned + 1, t), loss(s, t), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(d.relational_distances(s @ turned, s), 0, atol=1e-6)
    maps = jax.random.normal(jax.random.key(2), (3, 4, 4, 6))
    np.testing.assert_allclose(d.attention_transfer(2 * maps[..., ::-1], maps), 0, atol=1e-6)


def test_wrong_calls():
    for call, message in [
        (lambda: d.soft_targets(S, T[..., :3]), "the teacher's"),
        (lambda: d.soft_targets(S, T, 0.0), "temperature=0.0"),
        (lambda: d.jensen_shannon(S, T, 1.0), "weight=1.0"),
        (lambda: d.decoupled(S, T, LABELS[:2]), "labels of shape"),
        (lambda: d.keep_top_k(T, 11), "k=11 of 10"),
        (lambda: d.top_k(S[:2], d.keep_top_k(T, 2)), "kept classes"),
        (lambda: d.projected(*FEATURES), "give a projection"),
        (lambda: d.projected(*FEATURES, jnp.ones((3, 12))), "does not map 8 features"),
        (lambda: d.attention_transfer(jnp.ones((2, 4, 3)), jnp.ones((2, 5, 3))), "resize"),
        (lambda: d.relational_distances(FEATURES[0][:1], FEATURES[1][:1]), "same 2 examples"),
        (lambda: d.contrastive(*FEATURES), r"\[n, features\] of both"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_classes_that_both_mask_have_no_derivative():
    """Against the same losses of the other classes alone."""
    s, t = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[2.0, 1.0, 0.0]])
    masked = lambda x: jnp.concatenate([x, jnp.full((1, 2), -jnp.inf)], 1)
    for loss in (
        jc.distillation.jensen_shannon,
        jc.distillation.reverse_kl,
        jc.distillation.soft_targets,
    ):
        value, slope = jax.value_and_grad(lambda s, f=loss: f(s, masked(t)).sum())(masked(s))
        want, alone = jax.value_and_grad(lambda s, f=loss: f(s, t).sum())(s)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(slope[:, :3], alone, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(slope[:, 3:], 0)
    one = lambda s: jc.distillation.decoupled(s, jnp.zeros((1, 1)), jnp.array([0])).sum()
    for found in jax.value_and_grad(one)(jnp.ones((1, 1))):
        np.testing.assert_array_equal(found, 0)
