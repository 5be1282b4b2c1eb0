"""Other people's rounding onto the same formats, and the table of who agrees with whom.

python tests/rounding_oracles.py > docs/results/rounding-exactness.md
"""

import importlib.metadata

import gfloat
import ml_dtypes
import numpy as np
from gfloat.formats import format_info_p3109
from gfloat.types import Domain, FormatInfo

from altgrad_jax.numerics import formats

DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E3M4": ml_dtypes.float8_e3m4,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E4M3_IEEE": ml_dtypes.float8_e4m3,
    "E5M2": ml_dtypes.float8_e5m2,
    "BF16": ml_dtypes.bfloat16,
    "FP16": np.float16,
}


def cast(fmt, x, saturate):
    """Through the dtype and back; to saturate, x is clipped first."""
    with np.errstate(over="ignore", invalid="ignore"):
        if saturate:
            x = np.clip(x, np.float32(-fmt.max), np.float32(fmt.max))
        q = x.astype(DTYPES[fmt.name]).astype(np.float32)
    # A dtype without NaN makes some number of it, where ours stays NaN.
    return q if fmt.has_nan else np.where(np.isnan(x), x, q)


def gfloat_info(fmt):
    """The same format in gfloat's terms: P3109 from its own table, the others from their constants."""
    if fmt.name.startswith("P3109_P"):
        return format_info_p3109(8, int(fmt.name.removeprefix("P3109_P")))
    return FormatInfo(
        fmt.name,
        k=fmt.bits,
        precision=fmt.mantissa_bits + 1,
        bias=fmt.bias,
        is_signed=True,
        domain=Domain.Extended if fmt.has_inf else Domain.Finite,
        has_nz=fmt.has_negative_zero,
        num_high_nans=fmt.n_magnitudes - 1 - fmt.max_code - fmt.has_inf,
        has_subnormals=True,
        is_twos_complement=False,
    )


def by_gfloat(fmt, x, saturate):
    with np.errstate(invalid="ignore"):
        x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return gfloat.round_ndarray(gfloat_info(fmt), x, sat=saturate).astype(np.float32)


def by_float64(fmt, x, saturate):
    return formats.round_reference(fmt, x, saturate=saturate).astype(np.float32)


ORACLES = {"float64 oracle": by_float64, "gfloat": by_gfloat, "ml_dtypes cast": cast}


def oracles_of(fmt):
    return {name: oracle for name, oracle in ORACLES.items() if oracle is not cast or fmt.name in DTYPES}


def mismatches(a, b):
    """How many float32 numbers differ in any bit; all NaN are equal."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return int(np.sum((a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))))


def switches(fmt):
    """The values of `saturate` that the format can be used with."""
    return (True, False) if fmt.has_inf or fmt.has_nan else (True,)


def main():
    import platform

    import jax

    from altgrad_jax.numerics.rounding import format_params, round_to_format

    rounded = jax.jit(round_to_format)
    print(
        "# Exactness of rounding to nearest\n\n"
        "`round_to_format` under jit, the format as traced data, against three other implementations: inputs tried,\n"
        "and mismatches in any bit (all NaN count as equal). Inputs: all 65,536 bfloat16 and all 65,536 float16\n"
        "numbers; every number of the format and every midpoint of neighbours, each with the float32 numbers beside\n"
        "it, of both signs; the edges of float32 (powers of two, ends of its ranges, infinity, NaN).\n\n"
        f"`python tests/rounding_oracles.py`, {jax.devices()[0].device_kind} ({platform.machine()}), "
        f"jax {jax.__version__}, ml_dtypes {ml_dtypes.__version__}, "
        f"gfloat {importlib.metadata.version('gfloat')}.\n"
    )
    print("| format | overflow | bfloat16 | float16 | midpoints | edges | " + " | ".join(ORACLES) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(ORACLES))
    total = 0
    longest = max(sum(map(len, formats.critical_inputs(fmt).values())) for fmt in formats.FORMATS.values())
    for fmt in formats.FORMATS.values():
        for saturate in switches(fmt):
            sets = formats.critical_inputs(fmt)
            x = np.concatenate(list(sets.values()))
            padded = np.pad(x, (0, longest - len(x)))  # one length, one program
            own = rounded(padded, format_params(fmt, saturate=saturate))[: len(x)]
            found = {name: mismatches(own, oracle(fmt, x, saturate)) for name, oracle in oracles_of(fmt).items()}
            total += sum(found.values())
            cells = [fmt.name, formats.certificate(fmt, saturate=saturate)["overflow"]]
            cells += [f"{len(inputs):,}" for inputs in sets.values()]
            cells += [str(found.get(name, "-")) for name in ORACLES]
            print("| " + " | ".join(cells) + " |")
    print(f"\nMismatches in all: {total}. Programs compiled for all of it: {rounded._cache_size()}.")


if __name__ == "__main__":
    main()
