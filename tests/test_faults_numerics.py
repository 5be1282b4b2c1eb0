"""NaN and infinities put into a training, in one small program; the whole campaign has more formats and optimizers."""

from campaigns import numerics


def test_every_fault_is_found_at_its_step_named_and_harms_nothing_else(tmp_path):
    said = []
    rows = numerics.run(tmp_path, seed=0, quick=True, say=said.append)
    assert [row for row in rows if row.wrong] == [] and "0 answered wrongly" in said[-1]
    places = {row.place for row in rows}
    assert places >= {
        "loss",
        "gradient",
        "output",
        "output's gradient",
        "loss, one micro-batch of 4",
        "mu",
        "nu",
        "parameter (kernel)",
        "parameter (bias)",
        "amax history of A",
        "amax history of G",
        "scale of stored weights",
        "residual",
    }
    layers = {row.layer for row in rows if row.place == "gradient"}
    assert len(layers) == 15 and layers == {row.layer for row in rows if row.place == "nu"}
    lines = numerics.table(rows)
    assert sum(int(line[numerics.COLUMNS.index("faults")]) for line in lines) == len(rows) > 100


def test_a_fault_that_is_not_answered_rightly_shows():
    row = numerics.Row("baseline", "NaN", "mu", "embed", "step 4", "None", "", "", ("located as None", "it moved"))
    (line,) = numerics.table([row, row._replace(wrong=())])[:1]
    assert line[numerics.COLUMNS.index("located correctly")] == line[-1] == "1 of 2"
