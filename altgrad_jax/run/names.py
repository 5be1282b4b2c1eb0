"""Names of metrics in records of before schema version 6, as those of today. No jax.

A name has one definition. Where the definition of a name changed in version 6, an older row's value is given under
another name that says what it is, so that nothing mixes the two:

    lost                       lost_update where weights are stored to nearest or with error feedback; not_flipped
                               under stochastic rounding, of which it said what one draw did not move
    update_norm, update_ratio, requested_... where weights are stored on a grid: the update that was asked for
    zero_update
    amax, scale of G           micro_batch_... where an update has several micro-batches: they grew with their number
    grad_snr at the first row  left out: it was 1 by construction

`update_stall` was raised by zero_update alone, so that stored weights could not raise it; alerts of older rows stay
what they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RENAMED_IN = 6  # the schema version
RENAMED = {
    "effective_lr": "update_gain",
    "lost_energy": "update_error",
    "scale": "encode_scale",
    **{f"scale_log2_{end}": f"decode_scale_log2_{end}" for end in ("mean", "std", "min", "max")},
}
_OF_UPDATE = ("update_norm", "update_ratio", "zero_update")
_OF_SIZE = ("amax", "scale", "scale_log2_mean", "scale_log2_min", "scale_log2_max")
_REQUESTED, _MICRO_BATCH = "requested_", "micro_batch_"


@dataclass(frozen=True)
class Names:
    """How the rows of one run are named.

    last_old: the last step whose row has the names of before version 6; -1 where none has, infinity where all have.
    at_rest, micro_batches: the settings weights_at_rest and grad_accum_steps of the run.
    """

    last_old: float = -1
    at_rest: str = "float32"
    micro_batches: int = 1

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Names":
        """Of the run that has this manifest. A run that was resumed by a later version has rows of both kinds."""
        config, starts = manifest["config"], manifest["starts"]
        last_old = math.inf
        if manifest["schema_version"] >= RENAMED_IN:
            new = [start["step"] for start in starts if start.get("schema_version", 0) >= RENAMED_IN]
            last_old = min(new) if 0 < len(new) < len(starts) else -1
        return cls(last_old, config.get("weights_at_rest", "float32"), config.get("grad_accum_steps", 1))

    def today(self, name: str) -> str:
        """The name of today of an old row's value."""
        statistic, slash, layer = name.partition("/")
        renamed = RENAMED.get(statistic, statistic)
        if statistic == "lost":
            renamed = "not_flipped" if self.at_rest == "stochastic" else "lost_update"
        elif statistic in _OF_UPDATE and self.at_rest != "float32":
            renamed = _REQUESTED + statistic
        elif statistic in _OF_SIZE and self.micro_batches > 1 and layer.endswith(("/G", ".g")):
            renamed = _MICRO_BATCH + renamed
        return renamed + slash + layer

    def before(self, name: str) -> str:
        """The name that an old row has for a name of today."""
        statistic, slash, layer = name.partition("/")
        plain = statistic.removeprefix(_REQUESTED).removeprefix(_MICRO_BATCH)
        of_plain = (old for old, new in RENAMED.items() if new == plain)
        candidates = (statistic + slash + layer for statistic in (*of_plain, "lost", plain))
        return next((old for old in candidates if self.today(old) == name), "")

    def upgraded(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the record under the names of today."""
        if row["step"] > self.last_old:
            return row
        return {
            self.today(name): value
            for name, value in row.items()
            if row["step"] > 1 or not name.startswith("grad_snr/")
        }
