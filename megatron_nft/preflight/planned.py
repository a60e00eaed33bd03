"""The planner's verdict on a run, for the GPUs that are there: an estimate, which refuses a run only where it says that it does not fit."""

from dataclasses import replace

from megatron_nft.config import Config
from megatron_nft.errors import UserError, first_line
from megatron_nft.planner.hardware import known
from megatron_nft.planner.plan import plan


def check_fits(settings: Config, gpus: list[str]) -> str:
    """The verdict on a config that says for how many nodes it is, or why there is none, in words; nothing for one that does not say it.

    gpus: the names of a node's. Raises UserError where the run does not fit.
    """
    if settings.plan.nodes is None:
        return ""
    asked, gpu = settings.plan.gpu, known(gpus[0])
    if gpu is None:
        return f"no plan: the planner does not know {gpus[0]}"
    try:
        found = plan(replace(settings, plan=replace(settings.plan, gpu=gpu)))
    except UserError as error:
        return f"no plan: {error.problem}"
    except Exception as error:  # an estimate that cannot be made, for whatever reason, keeps no run from its start
        return f"no plan: {type(error).__name__} ({first_line(error)})"
    there = "" if gpu == asked else f" on {gpu}, which is what is here (plan.gpu: {asked})"
    if not found.fits:
        raise UserError(f"{found.reasons[0]}{there}, as the planner estimates",
                        f"`megatron-nft plan` with the same settings, plan.gpu={gpu} and --search names layouts that fit; "
                        "plan.nodes=null goes on without a plan")  # fmt: skip
    return f"fits{there}, as the planner estimates"
