"""What this machine's GPUs and this torch can do together: looked at before anything is allocated on a GPU."""

import os
import re
from pathlib import Path

import torch

from megatron_nft.errors import UserError, first_line, needs_gpu

DRIVER = Path("/proc/driver/nvidia/version")  # there where NVIDIA's driver is loaded
VISIBLE = "CUDA_VISIBLE_DEVICES"
ON_PURPOSE = f"{VISIBLE}=-1 goes on without GPUs"
# Least compute capability of an FP8 recipe, and the first that lacks it again: transformer_engine.pytorch.quantization (2.20)
FP8_CHIPS = {"delayed": ((8, 9), None), "tensorwise": ((8, 9), None), "blockwise": ((9, 0), None), "mxfp8": ((10, 0), (12, 0))}
BLOCKWISE_CUDA = (12, 9)  # of torch, at least


def device_name() -> str:
    """This rank's GPU by its product name, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def check() -> None:
    """Raise UserError where a machine has NVIDIA GPUs, this torch is built for them and cannot use the one of this rank. Where no GPU is
    wanted (CUDA_VISIBLE_DEVICES=-1) and where torch is a build for the CPU, a run goes on without."""
    if torch.version.cuda is None:
        return
    if torch.cuda.is_available():
        _check_rank(local_rank(), torch.cuda.device_count())
        _check_code(local_rank())
    elif DRIVER.exists() and os.environ.get(VISIBLE) != "-1":
        _check_visible()


def local_rank() -> int:
    """The number of this rank's GPU on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _check_rank(rank: int, gpus: int) -> None:
    if rank >= gpus:
        only = f" ({VISIBLE}={os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
        raise UserError(f"local rank {rank} has no GPU: {gpus} are to be seen{only}", "start one rank a GPU, or make all GPUs visible")


def _check_visible() -> None:
    """torch sees no GPU where NVIDIA's driver is loaded: they are hidden, or it cannot use them."""
    if os.environ.get(VISIBLE, "unset").strip() not in ("", "NoDevFiles"):
        raise _unusable(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}")
    needs_gpu(
        f"{VISIBLE} is {os.environ[VISIBLE]!r} on a machine with GPUs, so that none is to be seen",
        f"ask Slurm for GPUs (--gpus-per-node), or unset it; {ON_PURPOSE}",
    )


def _unusable(torch_is: str) -> UserError:
    """Why torch cannot use the GPUs."""
    try:
        torch.cuda.init()  # raises what keeps it from starting
        why = "it sees none"
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
    if found := re.search(r"driver on your system is too old \(found version (\d+)\)", why):
        driver = int(found[1])  # 12040 for CUDA 12.4
        its = f"{driver // 1000}.{driver % 1000 // 10}"
        return UserError(
            f"the NVIDIA driver is for CUDA {its}, older than what {torch_is}, needs",
            f"update the driver, or install a torch built for CUDA {its} or earlier; {ON_PURPOSE}",
        )
    return UserError(
        f"this machine has an NVIDIA driver, but {torch_is}, cannot use its GPUs: {why}",
        f"see that nvidia-smi works there, and that a container was started with its GPUs (--gpus all); {ON_PURPOSE}",
    )


def _check_code(number: int) -> None:
    built = torch.cuda.get_arch_list()
    if not has_code(capability(number), built):
        major, minor = capability(number)
        name = f"{torch.cuda.get_device_name(number)}, sm_{major}{minor}"
        raise UserError(
            f"torch {torch.__version__} has no code for GPU {number} ({name}): it was built for {' '.join(built)}",
            f"install a torch that is built for sm_{major}{minor}",
        )


def capability(number: int | None = None) -> tuple[int, int]:
    """Compute capability of a GPU, by default of this rank's: (9, 0) of Hopper."""
    properties = torch.cuda.get_device_properties(local_rank() if number is None else number)
    return properties.major, properties.minor


def has_code(chip: tuple[int, int], built: list[str]) -> bool:
    """Whether code built for these architectures runs on a chip. Binary code (sm_80) runs on chips of its major number from its minor one
    on; of sm_90a, on that chip alone; of sm_100f, as of sm_100; PTX (compute_80) on all later chips. Nothing told: taken for granted."""
    for kind, number, special in re.findall(r"\b(sm|compute)_(\d+)([af]?)", " ".join(built)):
        code = divmod(int(number), 10)
        same = code == chip
        if same or (special != "a" and code <= chip and (kind == "compute" or code[0] == chip[0])):
            return True
    return not built


def fp8_fault(recipe: str) -> str:
    """Why this rank's GPU, or torch's CUDA, cannot compute an FP8 recipe; "" where they can."""
    (least, end), chip = FP8_CHIPS[recipe], capability()
    name = f"{torch.cuda.get_device_name(local_rank())} (compute capability {_dotted(chip)})"
    if chip < least:
        return f"{name} lacks it: it needs {_dotted(least)} or higher"
    if end is not None and chip >= end:
        return f"{name} lacks it: Transformer Engine has it below {_dotted(end)} only"
    cuda = tuple(int(part) for part in str(torch.version.cuda or "0.0").split(".")[:2])
    if recipe == "blockwise" and cuda < BLOCKWISE_CUDA:
        return f"it needs CUDA {_dotted(BLOCKWISE_CUDA)} or later, and torch {torch.__version__} is built for {torch.version.cuda}"
    return ""


def fp8_recipe_for(chip: tuple[int, int]) -> str | None:
    """The recipe to name in place of one that a chip lacks; None: it has none."""
    return "tensorwise" if chip >= FP8_CHIPS["tensorwise"][0] else None


def check_fp8(recipe: str) -> None:
    """Raise UserError for an FP8 recipe that this rank's GPU does not have."""
    if fault := fp8_fault(recipe):
        other = fp8_recipe_for(capability())
        raise UserError(f"model.fp8_recipe is {recipe}, and {fault}", f"set model.fp8_recipe={other}" if other else "set model.fp8=null")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
