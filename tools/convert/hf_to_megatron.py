"""Hugging Face directory -> Megatron checkpoint.

    python tools/convert/hf_to_megatron.py HF_DIR OUT_DIR

is `megatron-nft convert hf-to-megatron`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed

from megatron_nft.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
