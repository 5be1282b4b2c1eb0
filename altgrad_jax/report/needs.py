"""What a report will lack, said of configs before they are trained."""

from altgrad_jax.report.statistics import FEW

MIN_RATES = 3  # from that many on, an arm is taken at its own best learning rate


def is_reference(config):
    """Whether a run of this config trains in bfloat16, without a format."""
    exact = not config["use_fp8"] and list(config["recipe"]) in ([], ["bf16"])
    return exact and config["compute_dtype"] == "bfloat16" and config["optimizer"] == "adamw"


def _place(config):
    return config["learning_rate"], config["seed"], config["data_seed"]


def lacking(configs):
    """[sentence] of what a report of runs of these configs, [{setting: value}], could not say.

    Empty where nothing is lacking, and where nothing is to be compared: no config is in a number format.
    """
    references = {_place(config) for config in configs if is_reference(config)}
    others = [config for config in configs if config["use_fp8"] or list(config["recipe"]) not in ([], ["bf16"])]
    if not others:
        return []
    if not references:
        return ["no member trains in bfloat16, so that there is no gap to show: add members with use_fp8=False"]
    said = []
    if alone := [config["run_name"] for config in others if _place(config) not in references]:
        said.append(
            f"{len(alone)} of {len(others)} members in a format, such as {alone[0]}, have no bfloat16 member of the "
            "same learning_rate, seed and data_seed: add those, or leave these out"
        )
    rates, seeds, orders = (len(set(part)) for part in zip(*references))
    draws = len({place[1:] for place in references})
    if draws < FEW:
        what = "no interval, and every class is inconclusive" if draws < 2 else "wide intervals, which are marked"
        said.append(f"{draws} pair{'s' * (draws > 1)} of runs a format gives {what}: give seed {FEW} values or more")
    if orders < 2 and seeds > 1:
        said.append(
            "with one data_seed the intervals hold no other order of the data: give data_seed several values too"
        )
    if rates < MIN_RATES:
        said.append(f"no format is taken at its own best learning_rate: give {MIN_RATES} values or more")
    if not all(config["evaluate_all"] for config in configs):
        said.append("what other validation text would show is in no interval: set evaluate_all=True")
    return said
