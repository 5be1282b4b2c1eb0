"""Whole runs in number formats: what they record, that they resume to the byte, and what is refused before they start.

One configuration is compiled for most of these tests: E4M3 forward, E5M2 gradients, stored weights, a reference.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_training import make_data, rows_of, state_bytes, tiny

from altgrad_jax import train
from altgrad_jax.config import ADDED_IN_2
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import generate, load_model
from altgrad_jax.models.gpt2 import GPT
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.models.stacking import layers_of
from altgrad_jax.numerics import formats, rounding, whatif
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.run import look
from altgrad_jax.run import setup as run_setup
from altgrad_jax.run.checkpoint import list_steps, load_arrays
from altgrad_jax.run.folder import RunFolder
from altgrad_jax.run.setup import open_data, set_up
from altgrad_jax.step.program import Observed, compiler_options, require_float8_kernels
from altgrad_jax.step.quantization import QuantOptions

LAYERS = ("block_0/attn_qkv", "block_0/attn_out", "block_0/mlp_up", "block_0/mlp_down")
STORED = dict(
    use_fp8=True,
    formats=("E4M3", "block_*:G=E5M2"),
    weights_at_rest="stochastic",
    reference_gradient=True,
    reference_interval=3,
    diagnostic_interval=10,
    rank_threshold=0.6,
    rank_threshold_strict=0.7,
    metrics="format,ledger",
    checkpoint_interval=20,
    steps_per_dispatch=4,
)
OPERAND = {"overflow", "underflow", "clipped_energy", "sqnr_db", "amax", "encode_scale", "dynamic_range"}
OF_STORED = {"amax", "encode_scale", "dynamic_range"}  # weights on their grid are not rounded again
FROM_OWN_AMAX = OPERAND - {"overflow", "clipped_energy"}  # nothing can be clipped
CODES = {"codes_used", "codes_used_share", "code_entropy"}
LEDGER = {
    "flip",
    "not_flipped",
    "lost_update",
    "stall_ratio",
    "update_gain",
    "update_error",
    "ulps_moved",
    "scale_flip",
    "code_age",
}
FIDELITY = {f"grad_{name}{of}" for name in ("cosine", "sqnr_db", "flushed") for of in ("", "_bfloat16")}
# In row k + 1 stands update k, and every third one is compared.
COMPARED = set(range(1, 41, 3))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The uninterrupted run."""
    return train(tiny(**STORED), data_dir=data_dir, workdir=tmp_path_factory.mktemp("whole") / "run")


MIXED = dict(
    use_fp8=True,
    formats=("block_*/mlp_up=E3M4", "block_*/attn_out:WA=BF16", "head:G=E5M2"),
    scaling="current,delayed,rowwise",
    metrics="format,ledger",
    max_steps=2,
    warmup_steps=1,
    diagnostic_interval=1,
)


@pytest.fixture(scope="module")
def mixed(data_dir, tmp_path_factory):
    """Two updates with a float32 master, the head, a format of 16 bits, and scales of every kind."""
    return train(tiny(**MIXED), data_dir=data_dir, workdir=tmp_path_factory.mktemp("mixed") / "run")


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "diagnostics.jsonl").read_text().splitlines()]


def statistics_of(row, layer):
    """Names of the metrics `NAME/layer` of a row."""
    return {name.removesuffix(f"/{layer}") for name in row if name.endswith(f"/{layer}")}


# ---------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize(("made", "changes"), [("whole", STORED), ("mixed", MIXED)])
def test_every_name_of_a_row_is_one_that_wandb_can_be_asked_for(made, changes, data_dir, request):
    result = request.getfixturevalue(made)
    config = tiny(**changes)
    setup = set_up(config, open_data(config, data_dir, print), print)
    names = look.row_names(setup)
    look.require_wandb_keys(("codes_used/*", "mfu"), setup)
    assert len(names) == len(set(names))
    assert set(result.history) - {"step"} <= set(names)
    assert any(name.startswith("codes_used/") for name in result.history)


def test_the_rows_hold_every_layer_and_operand(whole):
    assert whole.exit_code == 0 and whole.verdict["nonfinite_steps"] == 0
    rows = rows_of(whole.run_dir)
    assert [row["step"] for row in rows] == list(range(41))
    for row in rows[1:]:
        diagnosed = row["step"] % 10 == 0
        for layer in LAYERS:
            assert statistics_of(row, f"{layer}/W") == OF_STORED | (CODES if diagnosed else set())
            for operand in "AG":
                # The first scale comes from the own amax.
                not_yet = {"overflow"} if row["step"] == 1 else set()
                assert statistics_of(row, f"{layer}/{operand}") == OPERAND - not_yet | (CODES if diagnosed else set())
            fidelity = FIDELITY if row["step"] in COMPARED else set()
            rank = {"stable_rank", "participation_ratio", "spectral_norm"} if diagnosed else set()
            assert statistics_of(row, layer) == LEDGER | fidelity | rank
        assert LEDGER <= set(row) and (row["step"] in COMPARED) == (FIDELITY <= set(row))
        assert not any(name.startswith("sparse/") for name in row) and "NaN" not in row.values()
    losses = whole.history["loss"][1:]
    assert losses[-5:].mean() < losses[:5].mean() - 0.3
    cosine = whole.history["grad_cosine"][1:]
    assert set(np.flatnonzero(np.isfinite(cosine)) + 1) == COMPARED and 0.9 < np.nanmin(cosine) < 1


def test_scales_come_from_the_largest_of_earlier_amaxes(whole):
    """amax_history is 16: the record itself says what the scale of the next update must be."""
    for name in (f"{layer}/{operand}" for layer in LAYERS for operand in "AG"):
        largest = {"A": 448.0, "G": 57344.0}[name[-1]]
        amax, scale = (whole.history[f"{statistic}/{name}"][1:] for statistic in ("amax", "encode_scale"))
        expected = [2.0 ** np.floor(np.log2(largest / max(amax[max(0, i - 16) : i]))) for i in range(1, 40)]
        np.testing.assert_array_equal(scale[1:], expected)


def test_the_manifest_certifies_the_formats(whole):
    found = json.loads((whole.run_dir / "manifest.json").read_text())
    assert found["schema_version"] == 8 and found["config"]["formats"] == ["E4M3", "block_*:G=E5M2"]
    assert [(layer["layer"], layer["w"], layer["a"], layer["g"]) for layer in found["formats"]["layers"]] == [
        (layer, "E4M3", "E4M3", "E5M2") for layer in LAYERS
    ]
    certificates = found["formats"]["certificates"]
    assert list(certificates) == ["E4M3", "E5M2"]
    x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    for name, dtype, largest in (("E4M3", ml_dtypes.float8_e4m3fn, 448), ("E5M2", ml_dtypes.float8_e5m2, 57344)):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            image = np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
        image[np.isnan(image)] = np.uint32(0x7FC00000).view(np.float32)
        certificate = certificates[name]
        assert certificate["image_sha256"] == hashlib.sha256(image.astype("<f4").tobytes()).hexdigest()
        assert certificate["overflow"] == "saturates" and certificate["device"] == jax.devices()[0].device_kind
        assert certificate["n_inputs"] > 2**16 and 0 < certificate["n_changed"] < certificate["n_inputs"]


def test_there_is_a_line_for_every_operand_of_every_diagnosis(whole):
    lines, rows = lines_of(whole.run_dir), rows_of(whole.run_dir)
    assert [(line["step"], line["layer"], line["operand"]) for line in lines] == [
        (step, layer, operand) for step in (0, 10, 20, 30, 40) for layer in LAYERS for operand in "WAG"
    ]
    tokens, width = 4 * 16, 16  # of one batch of the evaluation
    n_outputs = dict(zip(LAYERS, (3 * width, width, 4 * width, width)))
    n_inputs = dict(zip(LAYERS, (width, width, width, 4 * width)))
    for line in lines:
        layer, operand = line["layer"], line["operand"]
        fmt = formats.get_format("E5M2" if operand == "G" else "E4M3")
        K, N = n_inputs[layer], n_outputs[layer]
        codes, magnitudes = whatif.dense(line["codes"]), whatif.dense(line["magnitudes"])
        assert (len(codes), len(magnitudes)) == (256, whatif.N_BINS)
        assert codes.sum() == magnitudes.sum() == {"W": K * N, "A": tokens * K, "G": tokens * N}[operand]
        assert line["format"] == fmt.name and np.log2(line["scale"]) % 1 == 0 and line["amax"] > 0
        assert codes[fmt.max_code + 1 : 128].sum() == codes[fmt.max_code + 129 :].sum() == codes[128] == 0
        row = rows[line["step"]]
        name = f"{layer}/{operand}"
        used = np.count_nonzero(codes)
        share = codes[codes > 0] / codes.sum()
        assert row[f"codes_used/{name}"] == used
        assert row[f"codes_used_share/{name}"] == pytest.approx(used / fmt.n_finite)
        assert row[f"code_entropy/{name}"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-6)
        assert used == fmt.n_finite or row[f"code_entropy/{name}"] < np.log2(used)
        # The two histograms are of one tensor.
        lost = whatif.what_if(line["magnitudes"], fmt, line["scale"])
        assert codes[0] == pytest.approx(magnitudes[0] + lost["underflow"] * codes.sum())


@pytest.mark.parametrize("step", [20, 40])
def test_stored_weights_lie_on_their_grid_as_the_diagnosis_counts_them(whole, step):
    params = load_arrays(whole.run_dir, step, ("params/",))[0]["params"]
    lines = {line["layer"]: line for line in lines_of(whole.run_dir) if (line["step"], line["operand"]) == (step, "W")}
    for layer in LAYERS:
        line = lines[layer]
        scaled = weights_of(params, layer) * np.float32(line["scale"])
        as_float8 = scaled.astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(as_float8.astype(np.float32), scaled)
        codes = as_float8.view(np.uint8)
        expected = np.bincount(np.where(codes == 128, 0, codes).ravel(), minlength=256)
        np.testing.assert_array_equal(whatif.dense(line["codes"]), expected)
        assert line["amax"] == np.abs(weights_of(params, layer)).max()


def test_a_falling_rank_is_told_once_and_judged_after_the_warm_up(whole):
    """warmup_steps is 5, so the diagnosis at step 10 is the first that counts."""
    rows = rows_of(whole.run_dir)
    expected = []
    for layer in (*LAYERS, "embed"):
        threshold = 0.7 if layer in ("block_0/attn_out", "block_0/mlp_down", "embed") else 0.6
        rank = {step: rows[step][f"stable_rank/{layer}"] for step in (10, 20, 30, 40)}
        below = {step: rank[step] / rank[10] < threshold for step in rank}
        expected += [
            (step, layer, pytest.approx(rank[step] / rank[10], rel=1e-6))
            for step in (20, 30, 40)
            if below[step] and not below[step - 10]
        ]
    found = [
        (row["step"], alert["layer"], alert["value"])
        for row in rows
        for alert in row.get("alerts", ())
        if alert["kind"] == "rank_falling"
    ]
    assert sorted(found, key=lambda alert: alert[:2]) == sorted(expected, key=lambda alert: alert[:2])
    assert len({step for step, *_ in found}) > 1  # the interrupted run must know what it had told before


def test_what_does_not_apply_is_not_recorded(mixed):
    """A float32 master, scales from the own amax, and operands without a format."""
    rows = rows_of(mixed.run_dir)
    for row in rows[1:]:
        later = OPERAND if row["step"] > 1 else OPERAND - {"overflow"}
        found = {layer: [statistics_of(row, f"{layer}/{operand}") for operand in "WAG"] for layer in (*LAYERS, "head")}
        assert found == dict.fromkeys(LAYERS, [set()] * 3) | {
            "block_0/mlp_up": [FROM_OWN_AMAX | CODES, later | CODES, FROM_OWN_AMAX | CODES],
            "block_0/attn_out": [FROM_OWN_AMAX, later, set()],  # BF16 has more codes than a histogram holds
            "head": [set(), set(), FROM_OWN_AMAX | CODES],
        }
        for layer in (*LAYERS, "head"):
            of_weights = LEDGER - {"lost_update"} if found[layer][0] else set()
            assert statistics_of(row, layer) & LEDGER == of_weights
        assert not FIDELITY & set(row)
        assert 30 < row["sqnr_db/block_0/mlp_up/W"] < 40 and row["encode_scale/head/G"] > 1
    lines = lines_of(mixed.run_dir)
    assert {(line["layer"], line["operand"], line["format"], "codes" in line) for line in lines} == {
        *(("block_0/mlp_up", operand, "E3M4", True) for operand in "WAG"),
        *(("block_0/attn_out", operand, "BF16", False) for operand in "WA"),
        ("head", "G", "E5M2", True),
    }
    assert len(lines) == 3 * 6
    manifest = json.loads((mixed.run_dir / "manifest.json").read_text())
    assert list(manifest["formats"]["certificates"]) == ["BF16", "E3M4", "E5M2"]
    assert {"layer": "head", "w": None, "a": None, "g": "E5M2"} in manifest["formats"]["layers"]


@pytest.mark.parametrize("level, expected", [(0, ["E4M3", "E5M2"]), (1, ["E3M4"] * 2), (2, ["E2M5"] * 2)])
def test_a_diagnosis_names_the_format_in_use(level, expected):
    """After an emergency shift an operand has another format than the settings say."""
    quant = QuantOptions(
        tuple(resolve_rules(("head:W=E4M3", "head:G=E5M2"), 1)),
        emergency_formats=("E3M4", "E2M5"),
    )
    observed = Observed(np.ones((1, 3, 256)), np.ones((1, 3, whatif.N_BINS)), np.ones((1, 3)), np.ones((1, 3)))
    found, lines = look.diagnosis(quant, level, 7, observed)
    assert [(line["step"], line["layer"], line["operand"]) for line in lines] == [(7, "head", "W"), (7, "head", "G")]
    assert [line["format"] for line in lines] == expected
    assert found["codes_used_share/head/G"] == 256 / formats.get_format(expected[1]).n_finite


# ----------------------------------------------------------------------------------------------- interrupted, resumed


class Killed(BaseException):
    pass


def interrupt(monkeypatch, step, how):
    """At this step, which must end a dispatch: `how` is SIGTERM, or Killed, which saves nothing."""
    report_saves, came = RunFolder._report_saves, []

    def watched(self):
        if self.step == step and how is Killed:
            raise Killed
        if self.step == step and not came:  # a second signal would end the tests
            came.append(how)
            signal.raise_signal(how)
        report_saves(self)

    monkeypatch.setattr(RunFolder, "_report_saves", watched)


def test_an_interrupted_run_equals_the_whole(whole, data_dir, tmp_path, monkeypatch):
    """Stopped between two comparisons, then killed between a diagnosis and the next checkpoint, within a line."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 14, signal.SIGTERM)
        assert train(tiny(**STORED), data_dir=data_dir, workdir=run_dir).exit_code == 128 + signal.SIGTERM
    assert list_steps(run_dir) == [14]
    with monkeypatch.context() as patch:
        interrupt(patch, 34, Killed)
        with pytest.raises(Killed):
            train(tiny(**STORED), data_dir=data_dir, workdir=run_dir)
    assert list_steps(run_dir) == [20] and lines_of(run_dir)[-1]["step"] == 30 < rows_of(run_dir)[-1]["step"]
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        with open(run_dir / name, "a") as file:
            file.write('{"step": 35, "la')
    train(tiny(**STORED), data_dir=data_dir, workdir=run_dir)
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        assert (run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()
    assert state_bytes(run_dir, 40) == state_bytes(whole.run_dir, 40)
    assert {
        "quant/amax_history_Q3H",
        "quant/rest_scale/block_0.mlp_up",
        "quant/age/block_0.mlp_up",
        "monitor/lost_WS",
    } <= set(state_bytes(run_dir, 40))
    starts = json.loads((run_dir / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 14, 20]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"formats": ("E5M2",)}, r"formats: \['E4M3', 'block_\*:G=E5M2'\] in the run, \['E5M2'\] now"),
        ({"weights_at_rest": "nearest"}, "weights_at_rest: 'stochastic' in the run, 'nearest' now"),
        ({"reference_interval": 4, "amax_history": 4}, "amax_history: 16 .*, 4 now; reference_interval: 3 .*, 4 now"),
        (dict.fromkeys(STORED), "use_fp8: True in the run, False now; formats: .* now"),
    ],
)
def test_resume_refuses_other_formats_by_name(whole, data_dir, changes, words):
    before = (whole.run_dir / "manifest.json").read_bytes()
    settings = {name: value for name, value in {**STORED, **changes, "max_steps": 60}.items() if value is not None}
    with pytest.raises(UserError, match=f"made with other settings.*{words}.* another --workdir"):
        train(tiny(**settings), data_dir=data_dir, workdir=whole.run_dir)
    assert (whole.run_dir / "manifest.json").read_bytes() == before


BASELINE = dict(metrics="none", eval_interval=10, diagnostic_interval=10, steps_per_dispatch=10)


def test_a_run_of_schema_version_1_goes_on(data_dir, tmp_path):
    """Its manifest has none of the settings that joined with the formats."""
    run = functools.partial(train, data_dir=data_dir, workdir=tmp_path / "old")
    settings = {**BASELINE, "diagnostic_interval": 100}  # what version 1 did not have is as its default
    run(tiny(**settings, max_steps=10))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    path = tmp_path / "old" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert ADDED_IN_2 < set(manifest["config"]) and "formats" not in manifest
    manifest["config"] = {name: value for name, value in manifest["config"].items() if name not in ADDED_IN_2}
    path.write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(UserError, match=r"formats: \[\] in the run, \['E4M3'\] now"):
        run(tiny(**settings, max_steps=20, use_fp8=True, formats=("E4M3",)))
    assert run(tiny(**settings, max_steps=20)).exit_code == 0
    train(tiny(**settings, max_steps=20), data_dir=data_dir, workdir=tmp_path / "new")
    assert (tmp_path / "old" / "metrics.jsonl").read_bytes() == (tmp_path / "new" / "metrics.jsonl").read_bytes()
    assert state_bytes(tmp_path / "old", 20) == state_bytes(tmp_path / "new", 20)
    manifest = json.loads(path.read_text())
    assert manifest["schema_version"] == 8 and manifest["config"]["formats"] == []
    assert not (tmp_path / "old" / "diagnostics.jsonl").exists()


# ------------------------------------------------------------------------------------------------ before the first step


@pytest.fixture
def no_certificates():
    """Certificates are kept for the process; a test that changes the canary begins and ends without."""
    run_setup._certificate.cache_clear()
    yield
    run_setup._certificate.cache_clear()


@pytest.mark.parametrize(
    "round_fn",
    [
        lambda x, params: x,
        lambda x, params: x.astype(jnp.bfloat16).astype(jnp.float32),
        lambda x, params: rounding.round_to_format(x, params) * jnp.where(jnp.abs(x) == 1.5, 2, 1),
    ],
    ids=["nothing", "bfloat16", "one number wrong"],
)
@pytest.mark.usefixtures("no_certificates")
def test_nothing_is_trained_with_a_rounding_that_fails_its_canary(data_dir, tmp_path, monkeypatch, round_fn):
    monkeypatch.setattr(run_setup, "canary", functools.partial(rounding.canary, round_fn=round_fn))
    with pytest.raises(UserError, match="rounding to E4M3 is wrong on .*: run with another version of jax"):
        train(tiny(**STORED), data_dir=data_dir, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_certificates")
def test_every_format_that_may_be_used_passes_the_canary(data_dir, tmp_path, monkeypatch):
    """The emergency ones too, and with the run's way to overflow."""
    asked = []

    def canary(fmt, saturate):
        asked.append((fmt.name, saturate))
        if fmt.name == "FP16":
            raise UserError("enough")

    monkeypatch.setattr(run_setup, "canary", canary)
    with pytest.raises(UserError, match="enough"):
        train(
            tiny(
                use_fp8=True,
                formats=("E4M3", "block_*:G=E5M2"),
                saturate=False,
                metrics="none",
                emergency_formats=("E3M4", "FP16"),
            ),
            data_dir=data_dir,
            workdir=tmp_path / "run",
        )
    assert asked == [(name, False) for name in ("E4M3", "E5M2", "E3M4", "FP16")]


@pytest.mark.parametrize("n_products, platform, fits", [(12, "gpu", True), (11, "gpu", False), (0, "cpu", True)])
def test_native_products_that_the_compiler_did_not_make_are_refused(n_products, platform, fits):
    compiled = SimpleNamespace(as_text=lambda: 'custom_call_target="__cublas$lt$matmul$f8"\n' * n_products)
    device = SimpleNamespace(platform=platform, device_kind="card")
    if fits:
        require_float8_kernels(compiled, device, 4)
    else:
        with pytest.raises(UserError, match=r"needs 12 float8 products .* for card has 11: .*products='emulated'"):
            require_float8_kernels(compiled, device, 4)


def test_native_products_on_a_gpu_are_the_librarys_and_options_come_last():
    native, emulated = (SimpleNamespace(native=native) for native in (True, False))
    library = {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options(native, "gpu") == library
    for quant, platform in ((native, "cpu"), (emulated, "gpu"), (None, "gpu")):
        assert compiler_options(quant, platform) == {}
    given = ("xla_a=true", "xla_b=False", "xla_c=4", "xla_d=CONCURRENT")
    read = {"xla_a": True, "xla_b": False, "xla_c": "4", "xla_d": "CONCURRENT"}
    assert compiler_options(native, "gpu", given) == library | read
    assert compiler_options(None, "cpu", given) == read


# ------------------------------------------------------------------------------------------------------- afterwards


@pytest.mark.parametrize("name, step", [("whole", 20), ("whole", 40), ("mixed", 2)])
def test_evaluating_a_checkpoint_gives_the_records_validation_loss(request, name, step):
    run_dir = request.getfixturevalue(name).run_dir
    result = evaluate_checkpoint(run_dir, step=step)
    assert np.float32(result.val_loss) == np.float32(rows_of(run_dir)[step]["val_loss"])


def test_a_model_is_loaded_in_the_formats_that_it_was_trained_in(whole):
    params, config, settings, operands = load_model(whole.run_dir)
    params = jax.device_put(params)
    assert (
        sorted(layer for group in operands for layer in layers_of(group)) == sorted(LAYERS)
        and settings["weights_at_rest"] == "stochastic"
    )
    tokens = jnp.asarray([list(b"the council")])
    plain = GPT(dataclasses.replace(config, rules=()))
    plain_BLV = jax.jit(lambda: plain.apply({"params": params}, tokens).logits)()
    quantized_BLV = jax.jit(
        lambda operands: GPT(config).apply({"params": params}, tokens, quantized=Quantized(operands, {})).logits
    )(operands)
    difference = np.abs(np.asarray(quantized_BLV - plain_BLV)).max()
    assert 0.001 < difference < 0.5
    text = generate(params, config, list(b"the council"), max_new_tokens=4, temperature=0.0, operands=operands)
    assert text[0] == np.asarray(quantized_BLV)[0, -1].argmax()
