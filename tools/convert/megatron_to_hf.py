"""Megatron checkpoint, converted or from training -> Hugging Face directory.

    python tools/convert/megatron_to_hf.py CHECKPOINT_DIR OUT_DIR

is `megatron-nft convert megatron-to-hf`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed

from megatron_nft.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
