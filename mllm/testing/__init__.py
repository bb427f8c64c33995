"""Checks that a new compressor, encoder or adapter keeps the contract of its kind, for the tests of any package.

A test of pytest builds a case and calls one function:

    from mllm.testing import CompressorCase, check_compressor

    def test_my_compressor() -> None:
        check_compressor(CompressorCase(MyCompressor(...), space=SPACE, in_size=16, out_size=24, grid=(4, 4)))

Each check is a function of its own as well, and says what it found where it fails. mllm's own parts pass the same
checks.
"""

from mllm.testing.adapters import check_adapter
from mllm.testing.compressors import CompressorCase, check_compressor
from mllm.testing.encoders import EncoderCase, check_encoder

__all__ = ["CompressorCase", "EncoderCase", "check_adapter", "check_compressor", "check_encoder"]
