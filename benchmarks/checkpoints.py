"""How long training waits for a checkpoint: written while it goes on, and waited for.

    .venv/bin/python benchmarks/checkpoints.py [--model examples/arithmetic/model] [--rounds 15]

One rank with weights, float32 weights and moments of the model, saved in three ways, the first two by turns:

- asynchronous: what the loop waits for in all (the snapshot, starting the thread, asking whether it has ended, taking the result);
- synchronous: the same save with checkpoint.async_save off, checksums, manifest and every fsync included;
- Megatron's: dist_checkpointing.save() of the same state, which has no checksums and no manifest. It comes last: it forks, and whoever
  writes to memory that a fork shares pays for the copy.

Medians and least values over the rounds after a first one that is not counted (Megatron starts a helper process in it). The shares at the
end are of the medians: the target is at most 10 % of the synchronous save.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from megatron_nft import policy
from megatron_nft.config import Config
from megatron_nft.policy import checkpoint

STEP = 0.5  # seconds
MEGATRONS = "Megatron's"
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "arithmetic" / "model"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    config = Config(run_dir="")
    config.model.path, config.model.precision = arguments.model, "fp32"
    model = policy.Policy(config, policy.initialize(config.parallel, seed=1))
    seconds: dict[str, list[float]] = {"asynchronous": [], "synchronous": [], MEGATRONS: []}
    with tempfile.TemporaryDirectory(prefix="megatron-nft-checkpoints-") as scratch:
        for ways in ({"asynchronous": stall, "synchronous": waited_for}, {MEGATRONS: megatrons}):
            for number in range(arguments.rounds + 1):
                for way, save in ways.items():
                    directory = Path(scratch) / f"{save.__name__}_{number % 2}"  # the one before stays, as with checkpoint.keep
                    taken = save(model, directory)
                    if number:
                        seconds[way].append(taken)
        size = sum(file.stat().st_size for file in (Path(scratch) / "stall_0").iterdir())
    policy.shutdown()
    report(seconds, size)


def stall(model: policy.Policy, directory: Path) -> float:
    """Seconds that the loop waits for a save that it asks after once a step, in a step of half a second."""
    model.start_save(directory, {})
    time.sleep(STEP)
    while (saved := model.finish_save(wait=False)) is None:
        time.sleep(STEP)
    return checked(saved).stalled


def waited_for(model: policy.Policy, directory: Path) -> float:
    model.start_save(directory, {})
    return checked(model.finish_save(wait=True)).stalled


def checked(saved: checkpoint.Saved) -> checkpoint.Saved:
    if saved.problem:
        raise checkpoint.failed(saved)
    return saved


def megatrons(model: policy.Policy, directory: Path) -> float:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    shutil.rmtree(directory, ignore_errors=True)
    started = time.perf_counter()
    directory.mkdir()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(checkpoint.sharded_state(model, loading=False), str(directory), strategy)
    return time.perf_counter() - started


def report(seconds: dict[str, list[float]], size: int) -> None:
    print(f"a checkpoint of {size / 1e6:.1f} MB; the loop waits, in ms")
    print(f"{'way':<14}{'median':>9}{'least':>9}")
    for way, taken in seconds.items():
        print(f"{way:<14}{1000 * statistics.median(taken):9.1f}{1000 * min(taken):9.1f}")
    share = {way: statistics.median(seconds["asynchronous"]) / statistics.median(taken) for way, taken in seconds.items()}
    print(f"asynchronous: {share['synchronous']:.1%} of the same save waited for, {share[MEGATRONS]:.1%} of Megatron's")


if __name__ == "__main__":
    main()
