"""Convert there and back and compare every bit.

    python tools/convert/verify.py HF_DIR

is `megatron-nft convert verify`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed

from megatron_nft.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
