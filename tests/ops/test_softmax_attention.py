"""softmax_attention against other people's numbers, against the definition in float64, and against its own laws."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops.softmax_attention import Cache, init_cache, softmax_attention
from seqmodels.ops.softmax_attention.tiles import Tiles
from tests.goldens import golden_forms, load
from tests.ops.forms import DEFAULT
from tests.products import product, rest_in_tools
from tests.programs import fast_jit, matrix_products

# The package exports the function under the name of its module.
module = importlib.import_module("seqmodels.ops.softmax_attention")

B, H, G, K, V = 2, 4, 2, 8, 12
FORMS = {"recurrent": "recurrent", "parallel": "parallel", "chunked": "chunked", "tiles": "chunked"}
# "tiles" is the chunked form at lengths at which it would not yet loop over tiles; it is compiled apart for that.
COMPILED = {
    form: jax.jit(functools.partial(softmax_attention, implementation=implementation), static_argnames="window")
    for form, implementation in FORMS.items()
}


@pytest.fixture(params=rest_in_tools(FORMS, DEFAULT))
def attend(request, monkeypatch):
    """softmax_attention in one of its forms; where a test does not name them, the default one is in `make test`."""
    if request.param == "tiles":
        monkeypatch.setattr(module, "MAX_ROW_KEYS", 0)
    return COMPILED[request.param]


def of_every_form(names, values, forms=tuple(FORMS), **options):
    """Parameters of a test that `attend`s; see `product`."""
    return product("attend", forms, names, values, always=DEFAULT, indirect=("attend",), **options)


def draw(seed, T, *, batch=B, heads=H, groups=G, key_dim=K, value_dim=V, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((batch, T, heads, key_dim), (batch, T, groups, key_dim), (batch, T, groups, value_dim))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def draw_reset(seed, T, rate=0.08, batch=B):
    return jnp.asarray(np.random.default_rng(seed).random((batch, T)) < rate)


def definition(q, k, v, *, reset=None, window=None):
    """One query after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    starts = np.zeros(q.shape[:2], bool) if reset is None else np.asarray(reset)
    o = np.zeros(q.shape[:3] + v.shape[-1:])
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        first = 0 if window is None else max(0, t - window + 1)
        first = max([first, *np.flatnonzero(starts[b, : t + 1])])
        scores = k[b, first : t + 1, g] @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        o[b, t, h] = weights @ v[b, first : t + 1, g] / weights.sum()
    return o


def run_in_pieces(attend, q, k, v, lengths, cache, *, reset=None, window=None):
    outputs, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        o, cache = attend(
            q[:, piece],
            k[:, piece],
            v[:, piece],
            cache=cache,
            reset=None if reset is None else reset[:, piece],
            window=window,
        )
        outputs.append(o)
        start += length
    assert start == q.shape[1]
    return jnp.concatenate(outputs, axis=1), cache


def pulled(function, cotangent=None):
    """Compiled: arrays -> (outputs, gradients of <outputs, cotangent>); None is the outputs, NaN where they are not finite."""

    def run(*arrays):
        o, pull_back = jax.vjp(function, *arrays)
        return o, pull_back(jnp.where(jnp.isfinite(o), o, jnp.nan) if cotangent is None else cotangent)

    return fast_jit(run)


def empty(capacity, window=None, batch=B, dtype=jnp.float32):
    return init_cache(batch, capacity, G, K, V, window=window, dtype=dtype)


def close(actual, expected, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), atol=tolerance, rtol=0)


@pytest.mark.parametrize("attend", golden_forms(*FORMS), indirect=True)
@pytest.mark.parametrize("name", ["attn_mha", "attn_gqa", "attn_swa"])
def test_goldens(name, attend):
    golden = load(name)
    arrays = golden.arrays

    def run(q, k, v):
        return attend(q * q.shape[-1] ** -0.5, k, v, window=golden.entry["window"])[0]

    o, gradients = pulled(run, jnp.asarray(arrays["cot_o"]))(arrays["q"], arrays["k"], arrays["v"])
    close(o, arrays["o"])
    for gradient, letter in zip(gradients, "qkv", strict=True):
        close(gradient, arrays[f"grad_{letter}"], 5e-6)


@of_every_form(
    "T, window, with_reset",
    [
        (1, None, True),
        (7, None, False),
        (7, 1, False),
        (64, None, True),
        (65, 9, False),
        (130, None, True),
        (130, 9, True),
        (130, 100, False),
    ],
)
def test_definition(T, window, with_reset, attend):
    q, k, v = draw(T, T)
    reset = draw_reset(T, T) if with_reset else None
    close(attend(q, k, v, window=window, reset=reset)[0], definition(q, k, v, window=window, reset=reset))


def test_long_sequences_loop_over_tiles():
    T = 1025
    q, k, v = draw(0, T, batch=1, heads=2, groups=1)
    some = draw_reset(0, T, rate=0.003, batch=1)
    assert "stablehlo.while" in COMPILED["chunked"].lower(q, k, v).as_text()
    for window, reset in ((None, some), (300, None)):
        expected, _ = COMPILED["parallel"](q, k, v, window=window, reset=reset)
        close(COMPILED["chunked"](q, k, v, window=window, reset=reset)[0], expected, 1e-5)


@of_every_form(
    "lengths, window, with_reset",
    [
        ([1] * 12, 5, True),
        ([5, 1, 5, 1], 4, False),
        ([33, 1, 33], None, False),
        ([33, 1, 33], 5, True),
        ([70, 11, 1], 75, True),
    ],
    rest_is_rare=True,
)
def test_split(lengths, window, with_reset, attend):
    """Pieces with a carried ring = one call, whatever was read before; the window's ring wraps around many times."""
    T = sum(lengths)
    q, k, v = draw(1, T)
    reset = draw_reset(1, T) if with_reset else None
    cache = empty(T + 3, window)
    o, after = run_in_pieces(attend, q, k, v, lengths, cache, reset=reset, window=window)
    close(o, definition(q, k, v, window=window, reset=reset))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, cache)


@of_every_form("window", [None, 6], rest_is_rare=True)
def test_no_cache_is_an_empty_ring_that_can_be_carried_on(window, attend):
    """Without room to spare, what is carried on is a window, or the tokens since a reset."""
    T = 11
    q, k, v = draw(2, 2 * T)
    reset = jnp.zeros((B, 2 * T), bool).at[0, 7].set(True).at[:, T].set(window is None)
    first, second = slice(0, T), slice(T, 2 * T)
    expected = definition(q, k, v, window=window, reset=reset)
    arguments = {"window": window}
    o, cache = attend(q[:, first], k[:, first], v[:, first], reset=reset[:, first], **arguments)
    close(o, expected[:, first])
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty(T, window))
    o, _ = attend(q[:, second], k[:, second], v[:, second], cache=cache, reset=reset[:, second], **arguments)
    close(o, expected[:, second])


def test_a_reset_makes_room(attend):
    """A ring of 10 tokens serves any number of documents of at most 10."""
    T, capacity = 40, 10
    q, k, v = draw(3, T)
    reset = jnp.zeros((B, T), bool).at[0, ::10].set(True).at[1, 3::7].set(True)
    o, _ = run_in_pieces(attend, q, k, v, [9, 1, 9, 1, 1, 9, 9, 1], empty(capacity), reset=reset)
    close(o, definition(q, k, v, reset=reset))


def test_left_padding_is_no_padding(attend):
    """Rows of different lengths, padded on the left and marked, continue as if each had been read alone."""
    T, padding = 9, (0, 4)
    q, k, v = draw(4, T + 6)
    reset = jnp.zeros((B, T), bool).at[jnp.arange(B), jnp.array(padding)].set(True)
    cache = empty(T + 6)
    o, cache = attend(q[:, :T], k[:, :T], v[:, :T], cache=cache, reset=reset)
    later, _ = run_in_pieces(attend, q[:, T:], k[:, T:], v[:, T:], [1, 1, 4], cache)
    joined = jnp.concatenate([o, later], axis=1)
    for b, start in enumerate(padding):
        alone = definition(q[b : b + 1, start:], k[b : b + 1, start:], v[b : b + 1, start:])
        close(joined[b : b + 1, start:], alone)


def gradients(attend, q, k, v, cache, reset, window, o_bar, keys_bar):
    """Of the outputs and of the returned ring, for the inputs and the given ring."""

    def loss(q, k, v, keys, values):
        o, after = attend(q, k, v, cache=cache._replace(keys=keys, values=values), reset=reset, window=window)
        return jnp.vdot(o, o_bar) + jnp.vdot(after.keys, keys_bar)

    return fast_jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(q, k, v, cache.keys, cache.values)


@functools.cache
def gradient_of_the_recurrent_form(T, window, with_reset):
    """The arguments of `gradients`, and what they give."""
    q, k, v = draw(5, T)
    reset = draw_reset(5, T) if with_reset else None
    cache = COMPILED["parallel"](*draw(6, 20), cache=empty(25 + T, window), reset=draw_reset(6, 20), window=window)[1]
    rng = np.random.default_rng(7)
    o_bar, keys_bar = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((B, T, H, V), cache.keys.shape))
    arguments = q, k, v, cache, reset, window, o_bar, keys_bar
    return arguments, gradients(COMPILED["recurrent"], *arguments)


@of_every_form(
    "T, window, with_reset",
    [(1, None, True), (13, 7, False), (70, None, False), (70, None, True), (70, 7, True), (70, 100, False)],
    forms=("parallel", "chunked", "tiles"),
    rare=((1, None, True), (70, None, False), (70, 100, False)),
)
def test_gradients(T, window, with_reset, attend):
    """Those of the recurrent form."""
    arguments, expected = gradient_of_the_recurrent_form(T, window, with_reset)
    for one, other in zip(gradients(attend, *arguments), expected, strict=True):
        close(one, other, 1e-5)


@of_every_form("window", [None, 20], rest_is_rare=True)
def test_causality_is_exact(window, attend):
    T, t = 80, 41
    q, k, v = draw(8, T)

    def output_at_t(q, k, v):
        return jnp.sum(attend(q, k, v, window=window)[0][:, t])

    q_bar, k_bar, v_bar = fast_jit(jax.grad(output_at_t, argnums=(0, 1, 2)))(q, k, v)
    oldest = 0 if window is None else t - window + 1
    assert np.all(np.any(q_bar, axis=(2, 3)) == (np.arange(T) == t))
    for x_bar in (k_bar, v_bar):
        assert np.all(np.any(x_bar, axis=(2, 3)) == ((np.arange(T) >= oldest) & (np.arange(T) <= t)))


@of_every_form("window", [None, 6], rest_is_rare=True)
def test_nan_stays_in_its_document(window, attend):
    """Around a bad key in the ring, a bad value and a bad query, other documents have what clean inputs give."""
    T = 24
    starts = (9, 17)
    q, k, v = draw(9, T)
    reset = jnp.zeros((B, T), bool).at[0, jnp.array(starts)].set(True)
    cache = COMPILED["parallel"](*draw(10, 8), cache=empty(8 + T, window), window=window)[1]

    @fast_jit
    def run(q, v, cache):
        def outputs(q, k, v, keys, values):
            ring = cache._replace(keys=keys, values=values)
            return attend(q, k, v, cache=ring, reset=reset, window=window)

        (o, after), pull_back = jax.vjp(outputs, q, k, v, cache.keys, cache.values)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (after.cursor, after.live))
        o_bar = jnp.where(jnp.isfinite(o), 1.0, jnp.nan)
        return o, after, pull_back((o_bar, Cache(jnp.zeros_like(after.keys), jnp.zeros_like(after.values), *zeros)))

    unspoiled = run(q, v, cache)
    for poison in (np.nan, np.inf):
        bad_cache = cache._replace(keys=cache.keys.at[0, 0, 3, 0].set(poison))
        bad = run(q.at[0, 19, 1, 2].set(poison), v.at[0, 12, 1, 0].set(poison), bad_cache)
        check_nan_stays_in_its_document(bad, unspoiled, poison, window, attend)


def check_nan_stays_in_its_document(bad, unspoiled, poison, window, attend):
    o, after, (q_bar, k_bar, v_bar, keys_bar, _) = bad
    clean_o, clean_after, (clean_q_bar, clean_k_bar, clean_v_bar, clean_keys_bar, _) = unspoiled
    T = o.shape[1]

    spoiled = np.zeros((B, T, H), bool)
    spoiled[0, : 9 if window is None else 1, :2] = True  # slot 3 was written 5 steps ago
    spoiled[0, 12:17, 2:] = True
    spoiled[0, 19, 1] = True
    if poison is np.nan:
        np.testing.assert_array_equal(np.any(~np.isfinite(o), axis=-1), spoiled)
    close(np.where(spoiled[..., None], 0, o), np.where(spoiled[..., None], 0, clean_o))

    # Gradients inside a bad document may be anything; row 1 and the document between two bad ones may not.
    clean = np.ones((B, T), bool)
    clean[0, :9] = clean[0, 9:17] = clean[0, 17:] = False
    for one, other in ((q_bar, clean_q_bar), (k_bar, clean_k_bar), (v_bar, clean_v_bar)):
        close(np.asarray(one)[clean], np.asarray(other)[clean])
    close(keys_bar[1], clean_keys_bar[1])

    # The last document's tokens alone are carried on.
    q, k, v = draw(11, 3)
    arguments = {"window": window}
    assert np.all(np.isfinite(attend(q, k, v, cache=after, **arguments)[0]))
    close(*(attend(q, k, v, cache=ring, **arguments)[0] for ring in (after, clean_after)))


def test_a_clean_document_between_bad_ones_keeps_its_gradients(attend):
    T = 30
    q, k, v = draw(12, T)
    reset = jnp.zeros((B, T), bool).at[:, jnp.array([10, 20])].set(True)
    middle = slice(10, 20)

    run = pulled(lambda *x: attend(*x, reset=reset)[0])
    spoiled = (x.at[:, 4].set(jnp.nan).at[:, 25].set(jnp.inf) for x in (q, k, v))
    for one, other in zip(*(jax.tree.leaves(run(*inputs)) for inputs in (spoiled, (q, k, v))), strict=True):
        close(one[:, middle], other[:, middle])


def test_rows_of_the_batch_do_not_touch(attend):
    q, k, v = draw(13, 20)
    reset = draw_reset(13, 20)
    together, _ = attend(q, k, v, reset=reset)
    spoiled = [x.at[0].set(jnp.nan) for x in (q, k, v)]
    o, _ = attend(*spoiled, reset=reset)
    close(o[1], together[1])


def test_bfloat16(attend):
    """Narrow inputs are summed in float32: the error is that of the inputs and of the output alone."""
    q, k, v = draw(14, 90, dtype=jnp.bfloat16)
    cache = empty(95, dtype=jnp.bfloat16)
    o, after = attend(q, k, v, cache=cache)
    assert o.dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, cache)
    close(o, definition(q, k, v), 0.01)


def test_a_ring_of_another_dtype(attend):
    """The ring keeps its dtype, and the outputs the queries'; a bfloat16 step may read a float32 ring."""
    q, k, v = draw(15, 6, dtype=jnp.bfloat16)
    o, after = run_in_pieces(attend, q, k, v, [4, 1, 1], empty(6))
    assert (o.dtype, after.keys.dtype) == (jnp.bfloat16, jnp.float32)
    close(o, definition(q, k, v), 0.01)


@of_every_form("dtype", [jnp.float32, jnp.bfloat16], rest_is_rare=True)
def test_large_scores_stay_finite(dtype, attend):
    inputs = (30 * x for x in draw(16, 70, dtype=dtype))
    for x in jax.tree.leaves(pulled(lambda q, k, v: attend(q, k, v)[0])(*inputs)):
        assert np.all(np.isfinite(np.asarray(x, np.float32)))


def test_a_ring_is_a_scan_carry(attend):
    """Structure, shapes, dtypes and weak types do not change from one token to the next."""
    q, k, v = draw(17, 5)

    def step(cache, inputs):
        o, cache = attend(*(x[:, None] for x in inputs), cache=cache)
        return cache, o[:, 0]

    _, o = jax.lax.scan(step, empty(5), tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
    close(jnp.moveaxis(o, 0, 1), definition(q, k, v))


def value_and_gradient(q, k, v, *, window=None, implementation="chunked"):
    def loss(q, k, v):
        return jnp.sum(jnp.square(softmax_attention(q, k, v, window=window, implementation=implementation)[0]))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)


def test_memory_grows_with_length_not_with_its_square():
    def temporary_bytes(T, implementation="chunked"):
        x = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
        compiled = jax.jit(functools.partial(value_and_gradient, implementation=implementation)).lower(x, x, x)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    one_matrix = 4 * 4096**2
    assert temporary_bytes(4096) < one_matrix / 8
    assert temporary_bytes(4096, "parallel") >= one_matrix  # the measure sees such a matrix where there is one
    assert temporary_bytes(32768) < 10 * temporary_bytes(4096)


def largest_array(jaxpr):
    inner = [getattr(each, "jaxpr", each) for each in jax.tree.leaves([list(e.params.values()) for e in jaxpr.eqns])]
    sizes = [each.aval.size for equation in jaxpr.eqns for each in equation.outvars]
    return max([*sizes, *(largest_array(each) for each in inner if hasattr(each, "eqns"))], default=0)


def test_masks_are_made_tile_by_tile_in_a_loop_over_layers():
    """Documents are alike in every layer: JAX must not take the masks of all tiles out of the loop and keep them."""
    T = 4096
    reset = jax.ShapeDtypeStruct((1, T), bool)

    def loss(x, reset):
        def layer(x, _):
            return softmax_attention(x, x, x, reset=reset)[0], None

        return jnp.sum(jax.lax.scan(layer, x, length=2)[0])

    gradient = jax.make_jaxpr(jax.grad(loss))(jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32), reset)
    assert largest_array(gradient.jaxpr) < T * T / 16


@pytest.mark.parametrize("T", [256, 1024, 4096])
def test_cost_is_what_is_seen(T):
    """Causality saves at least a third of the products of the full matrix, a window all beyond two blocks of it."""
    x = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

    def cost(**options):
        return matrix_products(jax.make_jaxpr(functools.partial(value_and_gradient, **options))(x, x, x).jaxpr)

    full = 7 * 16 * T * T  # two products forward, five backward, the scores once more
    assert full / 2 < cost() < full * 2 / 3
    if T == 4096:
        assert cost(window=128) < 7 * 16 * T * (2 * 128)
        assert cost(window=128) > 7 * 16 * T * 128


@pytest.mark.tools
@pytest.mark.parametrize("max_row_keys", [module.MAX_ROW_KEYS, 0], ids=["rows", "tiles"])
@pytest.mark.parametrize("heads_at_once", [1, 2, 4, 5])
def test_a_few_heads_at_a_time_are_all_of_them(heads_at_once, max_row_keys, monkeypatch):
    """A head, a row of the batch, two rows; outputs and gradients, with documents in each row."""
    T, batch = 70, 4
    monkeypatch.setattr(module, "num_cores", lambda: 1)
    monkeypatch.setattr(module, "MAX_ROW_KEYS", max_row_keys)
    inputs, reset = draw(1, T, batch=batch), draw_reset(2, T, batch=batch)

    def run(block_bytes):
        monkeypatch.setattr(module, "BYTES_IN_CACHE", block_bytes)

        @fast_jit
        def o_and_gradients(*inputs):
            o, backward = jax.vjp(lambda *inputs: softmax_attention(*inputs, reset=reset)[0], *inputs)
            return o, backward(o)

        return o_and_gradients.lower(*inputs).as_text().count("stablehlo.while"), o_and_gradients(*inputs)

    loops, expected = run(2**40)
    block = 4 * (H // G) * 64 * (T if max_row_keys else 64)
    loops_of_parts, found = run(heads_at_once * block)
    assert loops_of_parts > loops
    jax.tree.map(close, found, expected)


def test_refusals():
    q, k, v = draw(18, 4)
    with pytest.raises(NotImplementedError, match="softmax does not split"):
        softmax_attention(q, k, v, implementation="associative")
    with pytest.raises(NotImplementedError, match="no Pallas kernel for this device"):
        softmax_attention(q, k, v, implementation="pallas")
    with pytest.raises(ValueError, match="flash.*is not one of recurrent"):
        softmax_attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="multiple of 3"):
        softmax_attention(q, jnp.repeat(k[:, :, :1], 3, axis=2), jnp.repeat(v[:, :, :1], 3, axis=2))
    with pytest.raises(ValueError, match="window=0"):
        softmax_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="does not fit"):
        softmax_attention(q, k, v, cache=init_cache(B, 5, G, K + 1, V))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_the_tiles_are_those_that_somebody_sees(window):
    """In the order of the loop; of a million steps they are millions, which are not counted one by one."""
    for num_steps, size, num_old in ((1, 4, 0), (64, 4, 0), (61, 8, 3), (16, 8, 17), (7, 1, 2)):
        plan = Tiles(num_steps, size, size, num_old, window)
        expected = []
        for i in range(-(-num_steps // size)):
            oldest = -1 if window is None else i * size - window + 1
            expected += [(i, plan.old_blocks + j) for j in range(i, max(oldest, 0) // size - 1, -1)]
            expected += [(i, j) for j in range(plan.old_blocks) if oldest < 0]
        assert plan.pairs().dtype == np.int32 and plan.pairs().tolist() == [list(pair) for pair in expected]
    assert len(Tiles(1 << 20, 512, 512, 0, None).pairs()) == 2048 * 2049 // 2
