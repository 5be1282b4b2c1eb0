"""The built-in model under `instrument` by recipes against the built-in step: no bit may differ.

Command: PYTHONPATH=.:tests JAX_PLATFORMS=cpu python tests/campaigns/instrument_built_in.py
Time: some minutes each.
"""

import pytest
from test_instrument_gpt2 import LONG_CASES, compare

if __name__ == "__main__":
    for name, case in LONG_CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            compare(*case, patch)
        print(f"{name}: loss, gradients and statistics are equal to the bit", flush=True)
