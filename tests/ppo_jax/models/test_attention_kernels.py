"""Kernels against the formula, as far as they run without their device, and when they are taken."""

from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models import attention_kernels
from ppo_jax.models.attention import KeyValue, attend, sequences
from ppo_jax.models.attention_kernels import kernels, splash

BATCH, HEADS, KV_HEADS, SIZE, HEAD_SIZE = 2, 2, 1, 300, 16
PACKED = np.zeros((BATCH, SIZE), np.int32)
PACKED[0, :200] = np.repeat([3, 1, 7], [90, 60, 50])
PACKED[1, :130] = 2


@pytest.fixture
def arrays():
    """Query, key, value and cotangent, in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, SIZE, HEAD_SIZE) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def value_and_gradients(function, query, key, value, cotangent, is_real):
    """In float32; of real positions alone, as nothing that counts depends on the others."""
    kept = jnp.where(is_real[:, None, :, None], cotangent, 0)
    mixed, pull_back = jax.vjp(function, query, key, value)
    mixed = jnp.where(is_real[:, None, :, None], mixed, 0)
    return [np.asarray(x, np.float32) for x in (mixed, *pull_back(kept))]


def check(kernel, attention_mask, arrays):
    """Within the rounding of bfloat16 of the formula in float32."""
    seen = sequences(jnp.asarray(attention_mask), SIZE)
    is_real = seen.number > 0
    *arrays, cotangent = arrays

    def by_formula(query, key, value):
        return attend(query, KeyValue(key, value), seen.mask)

    wide = [x.astype(jnp.float32) for x in (*arrays, cotangent)]
    expected = value_and_gradients(by_formula, *wide, is_real)
    ours = value_and_gradients(lambda *x: kernel(*x, seen.number), *arrays, cotangent, is_real)
    plain = value_and_gradients(by_formula, *arrays, cotangent, is_real)
    for x, as_plain, y in zip(ours, plain, expected, strict=True):
        assert np.isfinite(x).all()
        error = abs(x - y).max()
        assert error < 0.02 * abs(y).max()
        assert error < 2 * abs(as_plain - y).max() + 0.005 * abs(y).max()


@pytest.mark.slow
@pytest.mark.parametrize("attention_mask", [PACKED, np.array([300, 77])], ids=["packed", "lengths"])
def test_splash_attention_is_the_formula(attention_mask, arrays):
    """In JAX's interpreter, of rows that are padded. Sequences in one do not see each other."""
    check(lambda *inputs: splash(*inputs, True), attention_mask, arrays)


def test_what_cudnn_is_asked_for_is_the_formula(monkeypatch, arrays):
    """The same call of JAX, by its own formula: causal, and no mask at all."""
    by_xla = partial(attention_kernels.of_positions, implementation="xla")
    monkeypatch.setattr(attention_kernels, "of_positions", by_xla)
    check(attention_kernels.cudnn, np.array([300, 77]), arrays)


def test_splash_attention_multiplies_what_it_can(arrays):
    """Whatever is asked of products in float32: with "highest", Mosaic compiles no bfloat16's."""

    def total(query, key, value):
        number = jnp.ones((BATCH, SIZE), jnp.int32)
        return splash(query, key, value, number).astype(jnp.float32).sum()

    with jax.default_matmul_precision("highest"):
        program = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*arrays[:3]))
    assert program.count("dot_general[") >= 8  # two, three, and four for keys and values
    assert "HIGHEST" not in program


class Device(SimpleNamespace):
    platform = "gpu"
    compute_capability = "9.0"
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")


@pytest.fixture
def has_cudnn(monkeypatch):
    """A machine with an H100, as far as it is asked."""

    def of_positions(query, *_):
        if query.shape[-1] > 128:
            raise NotImplementedError("the head")
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(attention_kernels, "of_positions", of_positions)


def found(dtype="bfloat16", size=256, head_size=64, is_one_a_row=True):
    query = jnp.zeros((2, 4, size, head_size), dtype)
    key = jnp.zeros((2, 2, size, head_size), dtype)
    return sorted(kernels(query, key, is_one_a_row=is_one_a_row))


def test_when_a_gpu_takes_its_kernel(has_cudnn, monkeypatch):
    for dtype in ("bfloat16", "float16"):
        assert found(dtype) == ["cuda"]
    assert found(size=704) == found(size=96) == ["cuda"]
    assert found("float32") == []
    assert found(is_one_a_row=False) == []  # would need a mask
    assert found(head_size=136) == []  # JAX refuses
    monkeypatch.setattr(Device, "compute_capability", "7.5")
    assert found() == []
    monkeypatch.setattr(Device, "compute_capability", "gfx942")
    monkeypatch.setattr(Device, "client", SimpleNamespace(platform_version="rocm 70000"))
    assert found() == []


@pytest.mark.skipif(
    any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))), reason="it may have cuDNN"
)
def test_a_gpu_without_cudnn_does_without_its_kernel(monkeypatch):
    """As this machine is one, if it is taken for a GPU's: JAX says that there is no cuDNN."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert found() == []


def test_programs_for_other_platforms_have_their_kernels(has_cudnn, monkeypatch):
    """Those that are only compiled here."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(Device, "compute_capability", None)
    assert found() == ["cuda", "tpu"]


def test_when_a_tpu_takes_its_kernel(monkeypatch):
    def no_cudnn(*_):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(attention_kernels, "of_positions", no_cudnn)
    assert found() == found(is_one_a_row=False) == found(size=704) == ["tpu"]
    assert found("float16") == found("float32") == []
    assert found(size=128) == []  # a single block: there is nothing to leave out


@pytest.mark.parametrize("is_one_a_row", [True, False])
def test_a_program_has_the_kernel_of_its_platform(is_one_a_row):
    """Forward and backward, and nothing of the kernels on a CPU."""
    query = jnp.zeros((2, 4, 256, 64), jnp.bfloat16)
    key_value = KeyValue(*jnp.zeros((2, 2, 2, 256, 64), jnp.bfloat16))
    lengths = jnp.array([256, 7])
    attention_mask = lengths if is_one_a_row else jnp.arange(256) < lengths[:, None]

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def mixed(query, key_value):
        return attend(query, key_value, sequences(attention_mask, 256)).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(mixed, (0, 1))).trace(query, key_value)
    of_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert of_tpu.count("tpu_custom_call") >= 3  # forward, d_query, d_key with d_value
    assert "2x2x512x256xf32" not in of_tpu  # logits
    for platform in ("cpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "custom_call @tpu" not in text
        assert "2x2x512x256xf32" in text
