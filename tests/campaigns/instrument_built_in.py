"""The built-in model under `instrument` by NVFP4, its last block kept, against the built-in step: 0 bits may differ.

Command: PYTHONPATH=.:tests JAX_PLATFORMS=cpu python tests/campaigns/instrument_built_in.py       Time: some minutes.
"""

import pytest
from test_instrument_gpt2 import NVFP4, compare

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        compare(*NVFP4, patch)
    print("loss, gradients and statistics are equal to the bit")
