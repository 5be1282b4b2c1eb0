"""The benchmark: its arithmetic against NumPy and hand counts, its pipe to peers, and the script as a whole."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from altgrad_jax import cli
from altgrad_jax.bench import peers, programs, roofline, suites, tables, timing, torch_peer
from altgrad_jax.cli import load_config
from altgrad_jax.config import fitted
from altgrad_jax.errors import UserError
from altgrad_jax.models.flops import training_flops_per_token
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.llama import LlamaConfig
from altgrad_jax.models.model import init_params
from altgrad_jax.models.parameters import count_params
from altgrad_jax.step import update
from altgrad_jax.step.from_config import flops_per_step, model_config

ROOT = Path(__file__).parent.parent
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=256)
OPTIMIZER = dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, adam_eps=1e-8, weight_decay=0.1, grad_clip=1.0)


def quiet(text):
    pass


def script():
    spec = importlib.util.spec_from_file_location("bench_script", ROOT / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(**changes):
    config = fitted(load_config(str(ROOT / "configs" / "smoke.py")))[0]
    shape = {**SHAPE, "batch_size": 2, "compute_dtype": "float32", **changes}
    return programs.changed(config, shape)


# ---------------------------------------------------------------------------------------------------------- statistics


def fake_entry(name, seconds, steps=1, failing_at=None):
    """An Entry that takes the given seconds, round after round, the first one the warm-up."""
    waiting = list(seconds)

    def run():
        if failing_at is not None and len(waiting) == len(seconds) - failing_at:
            raise timing.Unavailable("no memory")
        return waiting.pop(0)

    return timing.Entry(name, run, steps, facts={"compile_s": 0.0})


def test_rounds_keep_every_rows_timings_in_the_order_of_the_rounds_and_the_warm_up_apart():
    entries = [fake_entry("a", [9, 1, 2, 3]), fake_entry("b", [8, 20, 40, 60], steps=10)]
    assert timing.warm_up(entries, say=quiet) == (entries, [])
    assert timing.time_rounds(entries, 3, say=quiet) == (entries, [])
    assert [entry.facts["first_dispatch_s"] for entry in entries] == [9, 8]
    assert [entry.seconds for entry in entries] == [[1, 2, 3], [2, 4, 6]]


def test_every_round_has_all_rows_in_an_order_of_its_own():
    said = []
    entries = [timing.Entry(name, lambda name=name: said.append(name) or 1.0) for name in "abcdef"]
    timing.time_rounds(entries, 8, say=quiet)
    rounds = [tuple(said[i : i + 6]) for i in range(0, 48, 6)]
    assert all(sorted(order) == list("abcdef") for order in rounds) and len(set(rounds)) > 4


def test_what_works_in_the_background_is_waited_for_outside_the_timing():
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    entry = timing.Entry("logged", lambda: passes(2.0), rest=lambda: passes(50.0))
    timing.time_rounds([entry], 2, say=quiet, clock=lambda: now[0])
    assert entry.seconds == [2.0, 2.0] and now[0] == 104.0


@pytest.mark.parametrize("failing_at", [0, 2])
def test_a_row_that_cannot_go_on_is_named_and_the_others_are_timed(failing_at):
    good, bad = fake_entry("good", [1] * 4), fake_entry("bad", [1] * 4, failing_at=failing_at)
    able, skipped = timing.warm_up([bad, good], say=quiet)
    able, later = timing.time_rounds(able, 3, say=quiet)
    assert able == [good] and len(good.seconds) == 3 and skipped + later == [("bad", "no memory")]


def test_ratios_are_taken_within_a_round():
    own, base = [1.0, 20.0, 3.0, 7.0], [1.0, 10.0, 1.0, 10.0]
    facts = timing.time_facts(own, base, baseline=own)
    low, middle, high = np.quantile(np.array(own) / np.array(base), [0.25, 0.5, 0.75])
    assert (facts["ratio_low"], facts["ratio"], facts["ratio_high"]) == pytest.approx((low, middle, high))
    # The ratio of the medians would be another number.
    assert facts["ratio"] != pytest.approx(np.median(own) / np.median(base))
    assert facts["ms_per_step"] == 1e3 * statistics.median(own) and facts["baseline_ratio"] == 1


def test_a_budget_takes_rows_from_the_end_and_then_rounds():
    entries = [timing.Entry(name, lambda: None, facts={"first_dispatch_s": s}) for name, s in zip("abcd", (1, 1, 4, 8))]
    assert timing.fit_to_budget(entries, 5, None) == (entries, 5, [])
    assert timing.fit_to_budget(entries, 5, 70.1) == (entries, 5, [])
    assert timing.fit_to_budget(entries, 5, 29) == (entries, 2, [])
    assert timing.fit_to_budget(entries, 5, 13) == (entries[:3], 2, ["d"])
    assert timing.fit_to_budget(entries, 5, 0.5) == (entries[:2], 1, ["c", "d"])


def test_straight_lines_are_numpys():
    x, y = np.array([1.0, 2, 4, 8, 12]), np.array([3.1, 5.2, 8.7, 17.4, 25.0])
    fit = timing.straight_line(x, y)
    b, a = np.polyfit(x, y, 1)
    assert (fit["a"], fit["b"]) == pytest.approx((a, b))
    assert fit["residuals"] == pytest.approx(y - a - b * x)
    assert fit["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert timing.straight_line(x, np.ones(5))["r2"] is None


# -------------------------------------------------------------------------------------------------------------- limits


def test_flops_by_formula_are_a_hand_count():
    # Per token and layer: attn_qkv 16 x 48, attn_out 16 x 16, mlp 16 x 64 twice; head 16 x 256: a multiplication and an
    # addition each, once forward and twice backward. Scores and their sum of values: 8 positions x 16, likewise.
    weights = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 16 * 256
    attention = 2 * 2 * 8 * 16
    sizes = {name: size for name, size in SHAPE.items() if name != "n_head"}
    assert training_flops_per_token(**sizes) == 2 * 3 * (weights + attention)


def test_the_number_of_parameters_is_the_models():
    sizes = {name: size for name, size in SHAPE.items() if name != "n_head"}
    assert roofline.parameters_of(**sizes) == count_params(init_params(GPTConfig(**SHAPE), 0))


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1}, {"tied_head": False, "qk_norm": True}])
def test_parameters_of_a_llama_are_counted(options):
    shapes = jax.eval_shape(functools.partial(init_params, LlamaConfig(**SHAPE, **options), 0))
    assert roofline.parameters_of(**SHAPE, model="llama", **options) == count_params(shapes)


def test_a_llama_has_no_peers():
    with pytest.raises(UserError, match="model='llama' has no peers, which are implementations of GPT-2"):
        script().run(tiny(model="llama"), peers="torch", nanogpt=None)


def test_flops_are_the_products_that_xla_counts_and_little_else():
    config = tiny(n_embd=64, block_size=32)
    # XLA counts the body of a loop over the blocks once.
    model = dataclasses.replace(model_config(config, jax.devices()[0]), unroll=True)
    windows = np.zeros((config.batch_size, config.block_size + 1), np.uint16)
    gradient = jax.jit(jax.grad(functools.partial(update.loss, model), has_aux=True))
    counted = gradient.lower(init_params(model, 0), windows, None).cost_analysis()["flops"]
    # Elementwise work (softmax, LayerNorm, GELU) is on top of the formula's products: a tenth at 64 wide.
    assert flops_per_step(config) < counted < 1.2 * flops_per_step(config)


def test_memory_of_a_step_holds_its_state():
    facts = programs.Bench().step(tiny(n_embd=64, block_size=32), buffer_steps=5, bare=True).facts
    assert facts["memory_bytes"] > 12 * roofline.parameters_of(n_layer=2, n_embd=64, block_size=32, vocab_size=256)


def test_floor_gap_and_mfu_are_those_of_each_round():
    probes = [
        timing.Entry("product", None, facts={"dtype": "bfloat16", "flops": 100}, seconds=[1.0, 2.0, 4.0]),
        timing.Entry("product", None, facts={"dtype": "float32", "flops": 100}, seconds=[2.0, 2.0, 2.0]),
        timing.Entry("copy", None, facts={"bytes": 10}, seconds=[1.0, 1.0, 5.0]),
    ]
    peaks, bandwidths = roofline.peaks_of(probes)
    # A float32 product can do a bfloat16 product's work, not the other way round.
    assert peaks == {"bfloat16": [100, 50, 50], "float32": [50, 50, 50]} and bandwidths == [10, 10, 2]
    facts = roofline.roofline_facts(
        [4.0, 8.0, 30.0], flops=200, bytes_least=30, peaks=peaks["bfloat16"], bandwidths=bandwidths
    )
    # Floors: max(2, 3), max(4, 3), max(4, 15).
    assert facts["gap"] == pytest.approx(2) and facts["gap_low"] == pytest.approx(np.quantile([4 / 3, 2, 2], 0.25))
    assert facts["floor_ms"] == 4000 and facts["floor_by"] == "bytes" and facts["mfu_of"] == "measured"
    assert facts["mfu"] == pytest.approx(0.5)
    stated = roofline.roofline_facts([4.0], flops=200, bytes_least=30, peaks=[100], bandwidths=[10], stated=500)
    assert stated["mfu"] == pytest.approx(0.1) and stated["mfu_of"] == "stated"


def test_what_does_not_fit_into_memory_is_left_out_with_a_reason():
    roofline.require_memory(10, None)
    roofline.require_memory(10, 11)
    with pytest.raises(timing.Unavailable, match="needs 3.0 GiB and 2.0 GiB are free"):
        roofline.require_memory(3 * 2**30, 2 * 2**30)
    assert roofline.free_memory({"bytes_limit": 10, "bytes_in_use": 4}) == 6


# -------------------------------------------------------------------------------------------------------------- tables


def measured(**changes):
    row = {
        "name": "bare step",
        "compile_s": 1.5,
        "first_dispatch_s": 0.25,
        "n_metrics": 1,
        "tokens_per_s": 1234.5,
        "flops": 2e9,
        "bytes_least": 4e9,
        "memory_bytes": 2**31,
        "mfu": 0.256,
        "mfu_of": "stated",
        "floor_ms": 0.5,
        "floor_by": "flops",
        "gap": 3.0,
        "gap_low": 2.5,
        "gap_high": 3.5,
    }
    row |= timing.time_facts([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    section = {
        "name": "metrics",
        "note": "",
        "base": "bare step",
        "rounds": 3,
        "rows": [row],
        "probes": {"copy": 3e9},
        "skipped": [{"name": "1B", "why": "too large"}],
        "fit": None,
    }
    return section | changes


def test_a_section_as_text():
    text = tables.section_text(measured())
    assert "| bare step | 2000.00 | 1,234 | 2.000 (1.500-2.500) | - | 1 | 1.5 | 0.25 |" in text
    assert "| bare step | 2 | 4 | 2 | 25.6% of stated | 0.5 | flops | 3.00 (2.50-3.50) |" in text
    assert "copy 3.0 GB/s" in text and "Left out: 1B (too large)" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


def test_a_line_through_points_as_text():
    rows = [{"ms_per_step": value} for value in (10.0, 20.0, 33.0)]
    fit = timing.straight_line([1, 2, 3], [10.0, 20.0, 33.0]) | {"x": [1, 2, 3], "x_name": "n_layer"}
    text = tables.fit_table(rows, fit)
    assert "ms/step = -2 + 11.5 x, R^2 = 0.9944" in text and "| 2 | 20.00 | 21.00 | -5.0% |" in text


# --------------------------------------------------------------------------------------------------------------- peers

FAKE_PEER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    answer = {"facts": {"torch": "0", "threads": 2}, "free": {},
              "build": {"compile_s": 0.5, "parameters": 7},
              "steps": {"seconds": 2.0 * request.get("n", 0), "loss": 1.0, "idle_s": 4.0, "idle_cpu_s": 1.0},
              "product": {"seconds": 3.0}}.get(request["do"])
    if request.get("dtype") == "bfloat16" and request["do"] == "build":
        answer = {"error": "RuntimeError: no bfloat16 here"}
    if request["do"] == "die":
        sys.exit("broken beyond repair")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake_peer():
    peer = peers.Peer([sys.executable, "-c", FAKE_PEER])
    yield peer
    peer.close()


def test_a_peers_steps_are_timed_by_itself_and_its_idleness_is_summed(fake_peer):
    assert fake_peer.facts == {"torch": "0", "threads": 2}
    entry = fake_peer.entry(
        "transformers GPT-2, eager, float32", shape=SHAPE, batch_size=2, steps=3, optimizer=OPTIMIZER
    )
    assert timing.time_rounds([entry], 2, say=quiet) == ([entry], [])
    assert entry.seconds == [2.0, 2.0] and entry.facts["compile_s"] == 0.5 and entry.facts["dtype"] == "float32"
    assert fake_peer.idleness()["idle_share"] == 0.25
    assert fake_peer.product("float32", 10, 2).facts["flops"] == 2000


def test_what_a_peer_cannot_do_is_a_row_left_out(fake_peer):
    with pytest.raises(timing.Unavailable, match="no bfloat16 here"):
        fake_peer.entry("transformers GPT-2, eager, bfloat16", shape=SHAPE, batch_size=2, steps=1, optimizer=OPTIMIZER)
    with pytest.raises(timing.Unavailable, match="needs .* GiB"):
        fake_peer.entry(
            "transformers GPT-2, eager, float32",
            shape=SHAPE,
            batch_size=2,
            steps=1,
            optimizer=OPTIMIZER,
            free_bytes=1000,
        )
    for _ in range(2):
        with pytest.raises(timing.Unavailable, match="has ended .broken beyond repair"):
            fake_peer.request(do="die")


def test_a_peers_mistakes_become_answers():
    server = torch_peer.Server("cpu")
    assert "KeyError" in json.loads(server.respond('{"do": "steps", "name": "x", "n": 1}'))["error"]
    second = json.loads(server.respond('{"do": "what"}'))
    assert "no such request" in second["error"]
    assert "JSONDecodeError" in json.loads(server.respond("nonsense"))["error"]


def test_nanogpt_is_offered_only_where_it_is_given(tmp_path):
    with pytest.raises(UserError, match="holds no model.py"):
        peers.require_nanogpt(str(tmp_path))
    (tmp_path / "model.py").write_text("")
    assert peers.require_nanogpt(str(tmp_path)) == str(tmp_path / "model.py")


NANO_STAND_IN = """
import dataclasses, torch
@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        torch.nn.init.normal_(self.wte.weight, std=0.02)
        self.ln = torch.nn.LayerNorm(config.n_embd)
    def forward(self, idx, targets):
        logits = self.ln(self.wte(idx)) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.mark.oracle
def test_torch_does_the_same_work_in_its_own_process(tmp_path):
    (tmp_path / "model.py").write_text(NANO_STAND_IN)
    peer = peers.Peer(nanogpt=peers.require_nanogpt(str(tmp_path)))
    try:
        assert peer.facts["threads"] == roofline.cpu_count() and len(peer.variants()) == 8
        for name in (
            "transformers GPT-2, eager, float32",
            "transformers GPT-2, eager, bfloat16",
            "nanoGPT, eager, float32",
        ):
            entry = peer.entry(name, shape=SHAPE, batch_size=2, steps=2, optimizer=OPTIMIZER)
            if "transformers" in name:
                assert entry.facts["parameters"] == count_params(init_params(GPTConfig(**SHAPE), 0))
            timing.time_rounds([entry], 1, say=quiet)
            first = peer.request(do="steps", name=name, n=1)["loss"]
            assert abs(first - np.log(SHAPE["vocab_size"])) < 0.75 and entry.seconds[0] > 0
        assert peer.product("bfloat16", 64, 1).run() > 0
    finally:
        peer.close()


# -------------------------------------------------------------------------------------------------- suites and script


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_can_be_planned_and_its_rows_have_names_of_their_own(suite):
    plan = suites.Plan(fitted(load_config(str(ROOT / "configs" / "bf16_baseline.py")))[0], programs.Bench(), 1, 1, None)
    sections = suites.sections_of(plan, {suite}, "E4M3", ("mxfp8", "nvfp4"))
    assert bool(sections) == (suite != "rounding")
    for section in sections:
        names = [row.name for row in section.rows]
        assert section.base in names and len(set(names)) == len(names)
        if section.x:
            assert set(section.x) == set(names)


def test_rows_are_chosen_by_patterns_and_the_row_that_ratios_refer_to_stays():
    names = ("bare step", "all metrics", "+ grad", "eager, float32")
    section = suites.Section("metrics", tuple(suites.Row(name, None, None) for name in names))
    chosen = suites.only_rows([section], ["*float32", "+*"])[0]
    assert [row.name for row in chosen.rows] == ["bare step", "+ grad", "eager, float32"]
    with pytest.raises(UserError, match=r"--rows has 'bfloat16', which fits no row: give patterns of bare step, all"):
        suites.only_rows([section], ["bare*", "bfloat16"])


def test_a_section_gets_its_rows_share_of_the_budget_or_nothing():
    one, two = (suites.Section(name, (None,) * n) for name, n in (("one", 3), ("two", 1)))
    built = [{"rows": [1, 2], "build_s": 20.0}]
    assert suites.share_of(100, [one, two], []) == 75 and suites.share_of(100, [two], built) == 100
    # Half of it is for building, and two rows take 20 s.
    assert suites.share_of(54, [one, two], built) == 40.5 and suites.share_of(52, [one, two], built) is None
    assert suites.share_of(-1, [one, two], []) is None
    rows = tuple(suites.Row(name, None, None) for name in ("bare step", "all metrics"))
    text = tables.section_text(suites.left_out(suites.Section("metrics", rows)))
    assert text == "## metrics\n\nLeft out: bare step, all metrics (the time budget does not reach it)"


def test_the_ladder_has_the_sizes_that_it_names():
    millions = {"10M": 10, "30M": 30, "100M": 100, "300M": 300, "1B": 1000}
    for name, (n_layer, n_head, n_embd) in suites.LADDER.items():
        n = roofline.parameters_of(n_layer=n_layer, n_embd=n_embd, block_size=256, vocab_size=50257)
        assert n == pytest.approx(1e6 * millions[name], rel=0.2) and n_embd == n_head * suites.HEAD_WIDTH


def test_rows_of_one_state_share_it_and_programs_are_compiled_once():
    bench, config = programs.Bench(), tiny(metrics="none")
    step = bench.step(config, buffer_steps=2)
    assert bench.step(programs.changed(config, {"run_name": "another"}), buffer_steps=2) is step
    step.prepare()
    one, two = (step.entry(name, steps=2, steps_per_dispatch=K) for name, K in (("one", 1), ("two", 2)))
    one.run(), two.run()
    assert int(step.dispatch(1).shape[0]) == 1 and len(bench._states) == 1
    assert int(bench.holder(step._key, None)[0].step) == 5


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(text, JSON) of a run of the script at a tiny size, in this process, which has jax already."""
    file, text, module = tmp_path_factory.mktemp("bench") / "bench.json", io.StringIO(), script()
    shape = [f"--config.{name}={size}" for name, size in SHAPE.items()]
    config, flags = cli.parse(
        [
            "--config",
            str(ROOT / "configs" / "smoke.py"),
            *shape,
            "--config.n_layer=1",
            "--config.batch_size=2",
            "--quick",
            "--rounds=2",
            "--peers=none",
            f"--json={file}",
            "--suite=metrics",
        ],
        module.FLAGS,
    )
    with contextlib.redirect_stdout(text):
        assert module.run(config, **flags) == 0
    return text.getvalue(), json.loads(file.read_text())


def test_the_script_tells_everything_of_every_row(ran):
    text, found = ran
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [suites.BARE, suites.ALL_METRICS, suites.LOGGED, suites.BARE_FLOAT32]
    for row in rows.values():
        assert f"| {row['name']} |" in text
        for field in (
            "ms_per_step",
            "tokens_per_s",
            "ratio",
            "ratio_low",
            "ratio_high",
            "flops",
            "bytes_least",
            "memory_bytes",
            "mfu",
            "floor_ms",
            "gap",
            "compile_s",
            "first_dispatch_s",
        ):
            assert row[field] > 0, field
        assert len(row["rounds_s"]) == 2
    assert found["deterministic"] is False and found["platform"] == jax.default_backend() and "peer" not in found
    assert "--quick" in found["cuts"][0] and found["cuts"][0] in text
    assert rows[suites.ALL_METRICS]["n_metrics"] > 100 and rows[suites.LOGGED]["steps_per_dispatch"] == 1


def test_the_scripts_ratios_belong_to_one_round(ran):
    rows = {row["name"]: row for row in ran[1]["rows"]}
    base = np.array(rows[suites.BARE]["rounds_s"])
    for row in rows.values():
        assert row["ratio"] == pytest.approx(np.median(np.array(row["rounds_s"]) / base))


@pytest.mark.parametrize(
    "flag, text, said",
    [
        ("suite", "speed", "metrics, dispatch"),
        ("quick", "maybe", "true or false"),
        ("rounds", "0", r"an integer in the range \[1, "),
        ("budget_s", "-1", r"an integer in the range \[1, "),
        ("peers", "jax", "one of torch, none"),
        ("nanogpt", "/nowhere", "model.py"),
    ],
)
def test_flags_that_cannot_be_used_are_one_sentence(flag, text, said):
    with pytest.raises(UserError, match=f"^--{flag}={text} cannot be used: give .*({said})"):
        cli.parse([f"--config={ROOT / 'configs' / 'smoke.py'}", f"--{flag}={text}"], script().FLAGS)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(use_fp8=True, formats=("E4M3",), metrics="all"), "sets the number formats itself"),
        (dict(dropout=0.1), "ratios to it would mislead"),
        (dict(deterministic=True), "--deterministic"),
    ],
)
def test_configs_whose_ratios_would_mislead_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        programs.require_plain(tiny(**changes))


def test_the_script_knows_the_suites():
    module = script()
    assert module.suites("all") == set(suites.SUITES) - {"scaling"} | {"all"}
    assert module.suites("scaling,metrics") == {"scaling", "metrics"}
