"""python -m megatron_nft.recipes is `nemorun megatron_nft`."""

import typer

from megatron_nft.recipes.commands import COMMANDS


def main() -> None:
    """NeMo-Run's command line with this package's commands alone."""
    app = typer.Typer(pretty_exceptions_enable=False, help="Start the training runs of slurm/*.sbatch with NeMo-Run.")
    for command in COMMANDS:
        command.cli_entrypoint.cli(app)
    app()


if __name__ == "__main__":
    main()
