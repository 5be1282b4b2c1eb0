"""The order of the windows, and what a training run reads from token files."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.data import dataset
from altgrad_jax.data.dataset import (
    HostStream,
    gather_windows,
    load_token_data,
    permute_windows,
    validation_windows,
    window_indices,
)
from altgrad_jax.data.prepare import prepare
from altgrad_jax.data.sources import Document, Source
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.errors import UserError

SIZES = [*range(1, 40), 63, 64, 65, 255, 256, 257, 999, 1000, 4097]


def scalar_reference(i: int, n: int, seed: int) -> int:
    """One window number in plain Python integers, as the module's docstring defines it."""
    m = 0xFFFFFFFF

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & m
        x = (x ^ x >> 15) * 0x846CA68B & m
        return x ^ x >> 16

    a = next(k for k in range(1, n + 1) if k * k >= n)
    b = -(-n // a)
    key = mix((mix(mix(seed & m) ^ (seed >> 32 & m)) + i // n) & m)
    x = i % n
    while True:
        left, right = divmod(x, b)
        for r in range(dataset.ROUNDS):
            round_key = mix((key + (r + 1) * 0x9E3779B9) & m)
            if r % 2 == 0:
                left = (left + mix(right ^ round_key) % a) % a
            else:
                right = (right + mix(left ^ round_key) % b) % b
        x = left * b + right
        if x < n:
            return x


@pytest.mark.parametrize("n", SIZES)
def test_every_epoch_is_a_permutation(n):
    for epoch in (0, 1, 7):
        order = window_indices(epoch * n, n, n, seed=3)
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 42445, 2**31 - 1])
@pytest.mark.parametrize("seed", [0, 42, -1, 2**40 + 5])
def test_equals_the_definition(n, seed):
    numbers = [0, 1, 2, n, n + 1, 5 * n + 3, 2**31 - 1, 2**32 - 1]
    numbers = np.array([i for i in numbers if i < 2**32], np.uint32)
    expected = [scalar_reference(int(i), n, seed) for i in numbers]
    assert permute_windows(numbers, n, seed).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 42445])
def test_jit_equals_numpy(n):
    on_device = jax.jit(lambda first: window_indices(first, 24, n, 42, jnp))
    for first in (0, 5, n - 1, 3 * n + 1, 2**31 - 100):
        expected = window_indices(first, 24, n, 42)
        for dtype in (jnp.int32, jnp.uint32):
            got = on_device(dtype(first))
            assert got.dtype == jnp.int32
            np.testing.assert_array_equal(got, expected)
    assert on_device._cache_size() == 2  # one program per dtype of `first`: the value is traced


def test_any_shape_and_traced_seed():
    numbers = np.arange(24).reshape(2, 3, 4)
    expected = permute_windows(numbers, 1000, 7)
    assert expected.shape == (2, 3, 4)
    assert permute_windows(5, 1000, 7).shape == ()
    got = jax.jit(lambda i, seed: permute_windows(i, 1000, seed, jnp))(numbers, jnp.uint32(7))
    np.testing.assert_array_equal(got, expected)


def test_seeds_and_epochs_give_other_orders():
    n = 1000
    orders = [window_indices(0, n, n, seed) for seed in (0, 1, 2, 2**32, -1)]
    orders += [window_indices(n, n, n, 0), window_indices(2 * n, n, n, 0)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in one place on average (Poisson): 10 has probability 1e-7.
            assert np.count_nonzero(one == other) < 10


def test_order_looks_uniform():
    n, n_seeds = 12, 4000
    orders = np.stack([window_indices(0, n, n, seed) for seed in range(n_seeds)])
    counts = np.stack([np.bincount(orders[:, i], minlength=n) for i in range(n)])
    expected = n_seeds / n
    chi2 = ((counts - expected) ** 2 / expected).sum()  # (n - 1)^2 = 121 degrees of freedom, sd 15.6
    assert chi2 < 121 + 6 * 15.6
    # Pairs too: the entry after entry 0 is any other value, equally often.
    gaps = np.bincount((orders[:, 1] - orders[:, 0]) % n, minlength=n)[1:]
    expected = n_seeds / (n - 1)
    assert ((gaps - expected) ** 2 / expected).sum() < 10 + 6 * np.sqrt(20)
    # Neighbours stay no neighbours in a large set.
    big = window_indices(0, 40_000, 40_000, 1).astype(np.float64)
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(40_000), big)[0, 1]) < 0.03


def test_validation_windows():
    ten = validation_windows(50, 10)
    assert ten.dtype == np.int32 and len(set(ten.tolist())) == 10 and ten.max() < 50
    np.testing.assert_array_equal(validation_windows(50, 20)[:10], ten)
    np.testing.assert_array_equal(np.sort(validation_windows(50, 50)), np.arange(50))
    for count in (51, 0, -1):
        with pytest.raises(UserError, match="holds 50"):
            validation_windows(50, count)


@pytest.mark.parametrize("extra", [0, 1, 4])
def test_gather_windows(extra):
    block_size = 5
    tokens_T = np.arange(100, 100 + 4 * block_size + 1 + extra).astype(np.uint16)
    index_B = np.array([[3, 0], [1, 2]], np.int32)  # 3 is the last window
    expected = np.stack([[tokens_T[w * 5 : w * 5 + 6] for w in row] for row in index_B])
    got = gather_windows(tokens_T, index_B, block_size)
    on_device = jax.jit(lambda t, i: gather_windows(t, i, block_size, jnp))(tokens_T, index_B)
    for windows in (got, on_device):
        assert windows.dtype == np.uint16
        np.testing.assert_array_equal(windows, expected)


# Token files


@pytest.fixture
def data_dir(tmp_path):
    documents = [Document("train", "a", "abcdefgh" * 5), Document("validation", "b", "xyz" * 9)]
    source = Source("local", "two documents", "CC0", "", "a document", lambda: iter(documents))
    prepare(source, tmp_path / "data", get_tokenizer("bytes"), progress=False)
    return tmp_path / "data"


def load(data_dir, vocab_size=256, block_size=8, **kwargs):
    return load_token_data(data_dir, vocab_size=vocab_size, block_size=block_size, **kwargs)


def test_load(data_dir):
    data = load(data_dir, tokenizer="bytes")
    assert bytes(data.train_T.astype(np.uint8)) == b"abcdefgh" * 5 + b"\xff"
    assert bytes(data.val_T.astype(np.uint8)) == b"xyz" * 9 + b"\xff"
    assert (data.n_train_windows, data.n_val_windows) == (5, 3)  # 41 and 28 tokens
    assert data.meta["licence"] == "CC0"
    assert data.fingerprint == load(data_dir).fingerprint
    assert not data.train_T.flags.writeable


def test_exactly_one_window_fits_and_one_token_less_does_not(data_dir):
    assert load(data_dir, block_size=27).n_val_windows == 1
    with pytest.raises(UserError, match="val.bin holds 28 tokens, fewer than one window of block_size . 1 = 29"):
        load(data_dir, block_size=28)


def test_changed_file_is_refused(data_dir):
    raw = bytearray((data_dir / "val.bin").read_bytes())
    raw[0] ^= 1
    (data_dir / "val.bin").write_bytes(raw)
    with pytest.raises(UserError, match="val.bin has changed since it was prepared"):
        load(data_dir)


@pytest.mark.parametrize(
    "content, message", [(b"", "holds 0 tokens"), (b"abc", "3 bytes, an odd number"), (None, "has no train.bin")]
)
def test_damaged_file_is_refused(data_dir, content, message):
    if content is None:
        (data_dir / "train.bin").unlink()
    else:
        (data_dir / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(data_dir)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(schema_version=2), "schema_version 2 where 1 is expected"),
        (lambda m: m.pop("sha256"), "has no 'sha256'"),
        (lambda m: m.clear(), "schema_version None"),
    ],
)
def test_unusable_meta_is_refused(data_dir, change, message):
    meta = json.loads((data_dir / "meta.json").read_text())
    change(meta)
    (data_dir / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=message):
        load(data_dir)
    (data_dir / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json cannot be read"):
        load(data_dir)


def test_vocabulary_and_tokenizer_must_fit(data_dir):
    with pytest.raises(UserError, match="holds the token 255 but vocab_size is 255"):
        load(data_dir, vocab_size=255)
    with pytest.raises(UserError, match="made by the tokenizer 'bytes' but 'gpt2'"):
        load(data_dir, tokenizer="gpt2")


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="has no train.bin and no val.bin"):
        load(tmp_path / "nowhere")


def test_nanogpt_files_without_meta(data_dir):
    with_meta = load(data_dir)
    (data_dir / "meta.json").unlink()
    data = load(data_dir, tokenizer="bytes")
    assert (data.meta["source"], data.meta["tokenizer"], data.meta["largest_token"]) == ("unknown", "bytes", 255)
    assert data.fingerprint == with_meta.fingerprint
    assert load(data_dir).fingerprint != with_meta.fingerprint  # of an unknown tokenizer


def test_fingerprint_follows_the_data(data_dir):
    before = load(data_dir).fingerprint
    (data_dir / "meta.json").unlink()
    np.arange(40, 80, dtype="<u2").tofile(data_dir / "val.bin")
    assert load(data_dir, tokenizer="bytes").fingerprint != before


def test_host_stream_gives_the_same_batches():
    tokens_T = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    n = (1000 - 1) // 8

    def expected(first, n_steps):
        index = window_indices(first * 4, n_steps * 4, n, 42).reshape(n_steps, 4)
        return gather_windows(tokens_T, index, 8)

    with contextlib.closing(HostStream(tokens_T, batch_size=4, block_size=8, seed=42, depth=3)) as stream:
        # In order, more steps than are read ahead, a jump ahead, a jump back, and on.
        for first, n_steps in [(0, 1), (1, 10), (11, 2), (50, 3), (51, 1), (2, 2), (4, 30)]:
            got = stream.get(first, n_steps)
            assert got.dtype == np.uint16
            np.testing.assert_array_equal(got, expected(first, n_steps))
    with pytest.raises(RuntimeError, match="shutdown"):
        stream.get(0, 1)


def test_host_stream_hands_on_the_readers_error():
    class Broken(np.ndarray):
        def __getitem__(self, key):
            raise OSError("disk gone")

    with contextlib.closing(
        HostStream(np.zeros(100, np.uint16).view(Broken), batch_size=1, block_size=8, seed=0)
    ) as stream:
        with pytest.raises(OSError, match="disk gone"):
            stream.get(0, 1)


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_tokens", {"train": 5, "val": 5}),
        ("n_tokens", 5),
        ("sha256", []),
        ("sha256", {"train.bin": None}),
        ("tokenizer", ["bytes"]),
        ("source", None),
        ("schema_version", True),
    ],
)
def test_meta_that_lies_or_is_of_another_type_is_refused(data_dir, key, value):
    meta = json.loads((data_dir / "meta.json").read_text())
    (data_dir / "meta.json").write_text(json.dumps({**meta, key: value}))
    with pytest.raises(UserError, match=f"meta.json has {key}.*prepare the data again"):
        load(data_dir)


@pytest.mark.parametrize("target, what", [("nowhere", "is missing"), ("/dev/zero", "is a device")])
def test_meta_that_is_no_file_is_refused(data_dir, target, what):
    (data_dir / "meta.json").unlink()
    (data_dir / "meta.json").symlink_to(target)
    with pytest.raises(UserError, match=f"meta.json {what}"):
        load(data_dir)


def test_a_folder_of_too_long_a_name_is_missing():
    with pytest.raises(UserError, match="has no train.bin"):
        load("x" * 5000)
