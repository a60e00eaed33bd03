"""NeMo-Run recipes: what slurm/*.sbatch start, as `run.Script`s, and executors for them. Imports nemo_run; needs neither torch nor vLLM.

    nemorun megatron_nft nft_32b run.executor=slurm train.steps=10 --dryrun      # or python -m megatron_nft.recipes nft_32b ...

or, in a program of one's own:

    script = recipes.nft_32b(["train.steps=10"])
    run.run(script, executor=recipes.fit(recipes.slurm(), script))
"""

from megatron_nft.recipes.commands import COMMANDS
from megatron_nft.recipes.executors import fit, local, slurm, slurm_ssh
from megatron_nft.recipes.scripts import nft_7b, nft_32b, nft_tiny

__all__ = ["COMMANDS", "fit", "local", "nft_7b", "nft_32b", "nft_tiny", "slurm", "slurm_ssh"]
