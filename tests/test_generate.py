"""The cache changes nothing, a seed decides everything, and samples follow the model's distribution."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax import cli
from altgrad_jax.config import ADDED_IN_2, default_config, to_dict
from altgrad_jax.errors import UserError
from altgrad_jax.inference import generate as generate_module
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import generate, load_model, sample_token
from altgrad_jax.models.gpt2 import GPT, GPTConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.model import init_params
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.models.stacking import layers_of
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.run import checkpoint
from altgrad_jax.step import quantization

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=256, compute_dtype="float32")
ROOT = Path(__file__).parents[1]
PROMPT = [5, 0, 17, 200]


@pytest.fixture(scope="module")
def params():
    """Parameters far enough from uniform predictions that argmax has no near ties."""
    tree = jax.jit(init_params, static_argnums=0)(TINY, 0)
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, tree)


@pytest.fixture(scope="module")
def logits_after(params):
    """tokens -> float32 logits [V] of the next token, by a full forward pass without a cache."""
    apply = jax.jit(lambda tokens_BL: GPT(TINY).apply({"params": params}, tokens_BL).logits)

    def logits(tokens):
        padded = np.zeros((1, TINY.block_size), np.int32)  # causal: what follows changes nothing
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply(padded))[0, len(tokens) - 1]

    return logits


@pytest.fixture(scope="module")
def run_dir(params, tmp_path_factory):
    """A run folder whose newest checkpoint (step 4) holds `params`."""
    folder = tmp_path_factory.mktemp("run")
    config = default_config()
    config.update({"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 256})
    config.update({"compute_dtype": "float32", "tokenizer": "bytes"})
    checkpoints = checkpoint.open_checkpoints(folder, max_checkpoints=2)
    for step, factor in ((2, 0.5), (4, 1.0)):
        state = {"params": jax.tree.map(lambda leaf: leaf * factor, params)}
        checkpoints.save(step, state, {"config": to_dict(config)})
    checkpoints.close()
    assert [outcome.error for outcome in checkpoints.check()] == [None, None]
    return folder


@pytest.mark.parametrize("length", [1, 4, 16])
def test_greedy_with_cache_is_greedy_without(params, logits_after, length):
    context = (PROMPT * 4)[:length]
    n_new = TINY.block_size - length + 1
    for token in generate(params, TINY, context, max_new_tokens=n_new, temperature=0.0):
        assert token == logits_after(context).argmax()
        context = [*context, token]
    assert len(context) == TINY.block_size + 1


def test_a_full_context_starts_over_from_its_last_half(params, logits_after):
    new_ids = generate(params, TINY, PROMPT, max_new_tokens=40, temperature=0.0)
    assert new_ids.shape == (40,) and new_ids.dtype == np.int32
    text, window = list(PROMPT), list(PROMPT)
    for token in new_ids:
        if len(window) > TINY.block_size:
            window = text[-TINY.block_size // 2 :]
        assert token == logits_after(window).argmax()
        text.append(token)
        window.append(token)


def test_of_a_long_prompt_the_last_block_is_read(params):
    long = np.random.default_rng(0).integers(0, 256, 50)
    np.testing.assert_array_equal(
        generate(params, TINY, long, max_new_tokens=1, temperature=0.0),
        generate(params, TINY, long[-16:], max_new_tokens=1, temperature=0.0),
    )
    other = np.concatenate([long[:-16], (long[-16:-15] + 1) % 256, long[-15:]])
    assert len(generate(params, TINY, other, max_new_tokens=30)) == 30


def test_same_seed_same_text_and_longer_texts_begin_with_shorter_ones(params):
    a, b = (generate(params, TINY, PROMPT, max_new_tokens=30, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(generate(params, TINY, PROMPT, max_new_tokens=7, seed=3), a[:7])
    assert not np.array_equal(generate(params, TINY, PROMPT, max_new_tokens=30, seed=4), a)


def test_top_k_of_one_is_greedy_and_zero_is_off(params):
    def ids(**options):
        return generate(params, TINY, PROMPT, max_new_tokens=20, seed=1, **options)

    np.testing.assert_array_equal(ids(temperature=5.0, top_k=1), ids(temperature=0.0))
    np.testing.assert_array_equal(ids(temperature=1.0, top_k=0), ids(temperature=1.0, top_k=None))
    np.testing.assert_array_equal(ids(temperature=1e-46), ids(temperature=0.0))  # 0 in float32
    np.testing.assert_array_equal(ids(temperature=0.0, top_k=7), ids(temperature=0.0))


def test_the_padding_of_a_vocabulary_is_never_drawn(params, logits_after):
    """As of GPT-2's 50,257 ids in a table of 50,304 rows, none of whose logits training has lowered."""
    prompt = [3, 0, 1]
    likely = int(logits_after(prompt).argmax())
    greedy = generate(params, TINY, prompt, max_new_tokens=1, temperature=0.0, n_ids=likely)
    assert greedy == [logits_after(prompt)[:likely].argmax()]
    drawn = generate(params, TINY, prompt, max_new_tokens=60, temperature=100.0, n_ids=likely)
    assert drawn.max() < likely
    with pytest.raises(UserError, match=f"the token {likely}, but the model knows 0 to {likely - 1}"):
        generate(params, TINY, [likely], max_new_tokens=1, n_ids=likely)


def test_a_loss_that_is_not_finite_is_an_error(params, run_dir, tmp_path):
    (tmp_path / "val.bin").write_bytes(np.frombuffer(b"The Council decides. " * 9, np.uint8).astype("<u2").tobytes())
    table = params["embed"]["embedding"].at[ord("C"), 0].set(np.nan)
    broken = params | {"embed": {"embedding": table}}
    checkpoints = checkpoint.open_checkpoints(tmp_path / "run", max_checkpoints=2)
    checkpoints.save(1, {"params": broken}, {"config": load_model(run_dir).settings})
    checkpoints.close()
    with pytest.raises(UserError, match="the loss of .*run on .*val.bin is nan"):
        evaluate_checkpoint(tmp_path / "run", token_file=tmp_path / "val.bin")


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 3), (1.0, 2)])
def test_samples_follow_the_distribution(temperature, top_k):
    logits_V = jnp.array([0.0, 2.0, -1.0, 1.0, 0.5])
    wanted_V = np.exp(np.asarray(logits_V, np.float64) / temperature)
    if top_k is not None:
        wanted_V[np.argsort(wanted_V)[:-top_k]] = 0
    wanted_V /= wanted_V.sum()
    draw = jax.jit(jax.vmap(lambda key: sample_token(logits_V, key, temperature, top_k)))
    n = 40_000
    frequency_V = np.bincount(draw(jax.random.split(jax.random.key(0), n)), minlength=5) / n
    # five standard deviations of a frequency
    np.testing.assert_array_less(np.abs(frequency_V - wanted_V), 5 * np.sqrt(wanted_V * (1 - wanted_V) / n) + 1e-9)


def test_a_tiny_temperature_does_not_overflow():
    # 8 and 9 divided by this are both infinite in float32.
    logits_V = jnp.array([8.0, 9.0])
    for seed in range(5):
        assert sample_token(logits_V, jax.random.key(seed), 2e-38, None) == 1


def test_every_new_token_has_its_own_random_key(params):
    """Also after a start over: with all logits equal, the tokens show the keys."""
    flat = jax.tree.map(jnp.zeros_like, params)
    new_ids = generate(flat, TINY, PROMPT, max_new_tokens=40, seed=9)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(9), i))(jnp.arange(40))
    wanted = jax.vmap(lambda key: sample_token(jnp.zeros(TINY.vocab_size), key, 1.0, None))(keys)
    np.testing.assert_array_equal(new_ids, wanted)


def test_generated_tokens_follow_the_models_distribution(params, logits_after):
    """The first new token over many seeds, at a temperature that makes several likely."""
    logits_V = logits_after(PROMPT).astype(np.float64) / 3
    probability_V = np.exp(logits_V - logits_V.max())
    probability_V /= probability_V.sum()
    n = 400
    tokens = [int(generate(params, TINY, PROMPT, max_new_tokens=1, temperature=3.0, seed=seed)[0]) for seed in range(n)]
    # surprise of the samples against the entropy: a normalised sum with known mean and variance
    surprise = -np.log(probability_V)
    mean = (probability_V * surprise).sum()
    std = np.sqrt((probability_V * (surprise - mean) ** 2).sum())
    assert std > 0.1
    assert abs(surprise[tokens].mean() - mean) < 5 * std / np.sqrt(n)


def test_it_stops_after_the_end_token(params):
    text = generate(params, TINY, PROMPT, max_new_tokens=40, temperature=3.0, seed=2)
    for end_id in (text[5], text[30]):
        first = list(text).index(end_id)
        got = generate(params, TINY, PROMPT, max_new_tokens=40, temperature=3.0, seed=2, end_id=int(end_id))
        np.testing.assert_array_equal(got, text[: first + 1])
    # An end token that ends the prompt is no reason to stop.
    assert len(generate(params, TINY, [*PROMPT, 9], max_new_tokens=3, temperature=3.0, end_id=9)) >= 1


def test_one_compile_serves_prompts_lengths_temperatures_and_seeds(params):
    generate(params, TINY, PROMPT, max_new_tokens=3, top_k=7)
    before = generate_module._continue._cache_size()
    for length, temperature, seed in ((1, 0.0, 1), (9, 0.7, 2), (16, 2.0, 3)):
        generate(
            params,
            TINY,
            (PROMPT * 4)[:length],
            max_new_tokens=20,
            temperature=temperature,
            seed=seed,
            top_k=7,
            end_id=3,
        )
    assert generate_module._continue._cache_size() == before


@pytest.mark.parametrize("block_size", [1, 3])
def test_the_smallest_contexts_work(block_size):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=4, block_size=block_size, vocab_size=7)
    small = jax.jit(init_params, static_argnums=0)(config, 0)
    new_ids = generate(small, config, [1, 2], max_new_tokens=9)
    assert len(new_ids) == 9 and set(new_ids) <= set(range(7))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 257}, "top_k = 257"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**31}, "seed = 2147483648"),
        ({"prompt_ids_L": []}, "no token"),
        ({"prompt_ids_L": [256]}, "token 256"),
    ],
)
def test_arguments_out_of_range_are_refused(params, options, complaint):
    arguments = {"prompt_ids_L": PROMPT, "max_new_tokens": 1} | options
    with pytest.raises(UserError, match=complaint):
        generate(params, TINY, **arguments)


def test_a_broken_model_is_an_error_not_a_text(params):
    broken = params | {"ln_f": {"scale": params["ln_f"]["scale"] * np.nan, "bias": params["ln_f"]["bias"]}}
    with pytest.raises(UserError, match="not finite"):
        generate(broken, TINY, PROMPT, max_new_tokens=5)


def test_load_model(run_dir, params, tmp_path):
    got, config, settings, _ = load_model(run_dir)
    assert config == TINY and settings["tokenizer"] == "bytes"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)
    half, *_ = load_model(run_dir, 2)
    np.testing.assert_array_equal(half["embed"]["embedding"], params["embed"]["embedding"] / 2)
    with pytest.raises(UserError, match="nowhere holds no checkpoint"):
        load_model(tmp_path / "nowhere")


def test_a_checkpoint_without_settings_is_refused(params, tmp_path):
    checkpoints = checkpoint.open_checkpoints(tmp_path, max_checkpoints=1)
    checkpoints.save(0, {"params": params}, {})
    checkpoints.close()
    with pytest.raises(UserError, match="does not record n_layer"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_head": 0}, "n_head=0 cannot be used"),
        ({"n_head": 7}, "cannot be split over n_head=7 heads"),
        ({"tokenizer": ["bytes"]}, "tokenizer=\\['bytes'\\]"),
        ({"compute_dtype": "float7"}, "compute_dtype='float7'"),
    ],
)
def test_a_checkpoint_whose_settings_describe_no_model_is_refused(run_dir, tmp_path, monkeypatch, change, message):
    arrays, meta = generate_module.load_arrays(run_dir, None, ("params/",))
    monkeypatch.setattr(generate_module, "load_arrays", lambda *_: (arrays, {"config": {**meta["config"], **change}}))
    with pytest.raises(UserError, match=f"describes no model: .*{message}"):
        load_model(run_dir)


def sample(run_dir, *arguments):
    """scripts/sample.py in this process."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "scripts" / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, values = cli.parse([str(run_dir), *arguments], module.FLAGS, config=False, arguments=module.ARGUMENTS)
    return module.run(**values)


def test_script_prints_samples(run_dir, params, capsys):
    sample(run_dir, "--prompt", "ab", "--max_new_tokens", "6", "--temperature", "0")
    out, err = capsys.readouterr()
    new_ids = generate(params, TINY, list(b"ab"), max_new_tokens=6, temperature=0.0, end_id=255)
    assert out == "ab" + bytes(token for token in new_ids if token != 255).decode(errors="replace") + "\n"
    assert err == ""

    sample(run_dir, "--num_samples", "2", "--seed", "7", "--max_new_tokens", "30")
    two, note = capsys.readouterr()
    assert "--- sample 2 of 2, seed 8\n" in two and "last 8 tokens" in note
    sample(run_dir, "--seed", "8", "--max_new_tokens", "30")
    assert two.endswith(capsys.readouterr().out)
    sample(run_dir, "--seed", "8", "--max_new_tokens", "30", "--step", "2")
    assert not two.endswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--num_samples", "0"], "num_samples"),
        (["--step", "3"], "step 3"),
        (["--top_k", "300"], "top_k = 300"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_script_refuses_what_it_cannot_do(run_dir, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        sample(run_dir, *arguments)


def test_script_ends_with_one_line_and_code_2(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "sample.py", tmp_path / "nowhere"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_script_is_silent_when_its_reader_leaves(run_dir):
    script = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "sample.py", run_dir, "--max_new_tokens", "20"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    script.stdout.close()
    complaint = script.stderr.read()
    script.stderr.close()
    assert script.wait() == 128 + signal.SIGPIPE
    assert complaint.startswith("note: ") and len(complaint.splitlines()) == 1


# --- models in number formats ---------------------------------------------------------------------

# Coarse, so that it shows: weights and activations of the block have one mantissa bit.
FORMATS = {
    "use_fp8": True,
    "formats": ["E6M1", "head:A=E4M3"],
    "weights_at_rest": "nearest",
    "operand_rounding": "stochastic",
    "emergency_formats": ["E3M4"],
}
AMAX = {"block_0/mlp_up": 3.0, "head": 5.0}


@pytest.fixture(scope="module")
def quantized_run(params, tmp_path_factory):
    """A run folder with the state of a run in FORMATS: step 2 before an emergency shift, step 4 after it."""
    folder = tmp_path_factory.mktemp("quantized")
    config = to_dict(default_config()) | FORMATS | {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    config |= {"vocab_size": 256, "compute_dtype": "float32", "tokenizer": "bytes"}
    options = quantization.options_of(config)
    small = {name: leaf for name, leaf in params.items() if name != "block_1"}
    weights = {layer: weights_of(small, layer) for layer in options.weight_layers}
    table = quantization.format_table(options)
    init = jax.jit(
        lambda level: quantization.init_state(
            options, weights, quantization.formats_at(jax.device_put(table), level), ages=False
        )[0]
    )
    checkpoints = checkpoint.open_checkpoints(folder, max_checkpoints=2)
    for step, level in ((2, 0), (4, 1)):
        state = init(level)
        history = np.ones(state.amax_history_Q3H.shape, np.float32)
        for q, layer in enumerate(options.layers):
            history[q, 1, 7] = AMAX.get(layer.layer, 1.0)
        state = state._replace(amax_history_Q3H=jnp.asarray(history), level=jnp.int32(level))
        checkpoints.save(step, {"params": small, "quant": state}, {"config": config})
    checkpoints.close()
    assert [outcome.error for outcome in checkpoints.check()] == [None, None]
    return folder


def greedy(config, params, operands, n_new):
    """Greedy tokens by full forward passes, without a cache."""

    @jax.jit
    def next_token(tokens_BL, length):
        out = GPT(config).apply({"params": params}, tokens_BL, quantized=Quantized(operands, {}))
        return out.logits[0, length - 1].argmax()

    tokens = list(PROMPT)
    for _ in range(n_new):
        padded = np.zeros((1, config.block_size), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(next_token(padded, len(tokens))))
    return tokens[len(PROMPT) :]


def test_text_comes_from_the_model_in_its_formats(quantized_run):
    params, config, _, operands = load_model(quantized_run, 2)
    plain = GPTConfig(**{**vars(config), "rules": ()})
    params = jax.device_put(params)
    by_model = greedy(config, params, operands, 12)
    ids = generate(params, config, PROMPT, max_new_tokens=12, temperature=0.0, operands=operands)
    assert list(ids) == by_model
    assert list(ids) != list(generate(params, plain, PROMPT, max_new_tokens=12, temperature=0.0))


@pytest.mark.parametrize("step, of_block, of_head", [(2, "E6M1", "E4M3"), (4, "E3M4", "E3M4")])
def test_a_checkpoint_is_loaded_in_the_formats_in_use(quantized_run, params, step, of_block, of_head):
    """After an emergency shift they are others; scales are the stored weights' own, and from the amaxes seen."""
    operands = load_model(quantized_run, step).operands
    of_layers = {
        layer: jax.tree.map(lambda leaf: leaf[i], of_group)
        for group, of_group in operands.items()
        for i, layer in enumerate(layers_of(group))
    }
    assert set(of_layers) == {f"block_0/{part}" for part in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")} | {"head"}
    for layer, (w, a, g) in of_layers.items():
        fmt = get_format(of_head if layer == "head" else of_block)
        largest = min(fmt.max_finite, 2.0**16)
        assert (a.format.mantissa_bits, a.format.max_finite) == (fmt.mantissa_bits, fmt.max_finite)
        assert a.scale == 2.0 ** np.floor(np.log2(largest / AMAX.get(layer, 1.0))) and a.seed is None
        if layer == "head":
            assert w is None and g is None
        else:
            assert w.format.max_finite == g.format.max_finite == fmt.max_finite and w.seed is None
            assert w.scale == 2.0 ** np.floor(np.log2(largest / np.abs(weights_of(params, layer)).max()))


@pytest.mark.parametrize("more", [set(), {"use_fp8"}])
def test_a_checkpoint_of_schema_version_1_has_no_formats(run_dir, params, tmp_path, more):
    _, config, settings, _ = load_model(run_dir)
    old = {name: value for name, value in settings.items() if name not in ADDED_IN_2 | more}
    checkpoints = checkpoint.open_checkpoints(tmp_path, max_checkpoints=1)
    checkpoints.save(0, {"params": params}, {"config": old})
    checkpoints.close()
    model = load_model(tmp_path)
    assert (model.config, model.settings, model.operands) == (config, old, {}) and config.rules == ()


def test_script_samples_from_a_model_in_formats(quantized_run, capsys):
    sample(quantized_run, "--step", "2", "--prompt", "ab", "--max_new_tokens", "6", "--temperature", "0")
    params, config, _, operands = load_model(quantized_run, 2)
    ids = generate(params, config, list(b"ab"), max_new_tokens=6, temperature=0.0, end_id=255, operands=operands)
    text = bytes(token for token in ids if token != 255).decode(errors="replace")
    assert capsys.readouterr().out == f"ab{text}\n"
