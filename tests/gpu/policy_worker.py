"""The policy under one set of kernels after another, in one process: log-probs, gradients, updates and what became of them on this
machine's device. A case that fails says so in its place and leaves the others alone."""

import gc
import json
import os
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from megatron_nft import batching, objectives, policy
from megatron_nft.config import load
from megatron_nft.policy import versions
from megatron_nft.policy.offload import LEVELS, _bytes_of
from tests.distributed.layout_worker import old_logprobs, one_each, tensors
from tests.support import made_up_groups, micro_batches_of

ADAM_UPDATES = 5


def main() -> None:
    # torch and cuBLAS look at it once, at this process's first product: that of a case which does not ask for the same bits
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = json.loads(Path(sys.argv[1]).read_text())
    configs = {name: load(arguments["config"], case["overrides"]) for name, case in arguments["cases"].items()}
    first = next(iter(configs.values()))
    topology = policy.initialize(first.parallel, first.seed)  # once: all cases are of one rank
    found = {}
    for name, case in arguments["cases"].items():
        found[name] = attempt(case, configs[name], topology)
        torch.save(found, arguments["output"])  # after each: a fault of the device may end the process
    policy.shutdown()


def attempt(case: dict, config, topology) -> dict:
    """What `run` finds, or the error that it raised."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))  # what deterministic_mode puts there is of its case alone
        if case["local"]:  # as if Transformer Engine were not installed
            stack.enter_context(mock.patch.object(versions, "have_transformer_engine", lambda: False))
        if case["alone"]:
            stack.enter_context(mock.patch.object(batching, "distribute", one_each))
        try:
            return run(case["part"], config, topology)
        except Exception:
            return {"error": traceback.format_exc()}
        finally:
            forget()


def run(part: str, config, topology) -> dict:
    torch.manual_seed(config.seed)
    policy.check(config, window=64)
    model = policy.Policy(config, topology)
    found = {"kernels": policy.kernels(config), "adam": versions.fused_adam() if torch.cuda.is_available() else None}
    found |= updates_by_adam(model) if part == "adam" else passes(model)
    if part == "journey":
        found["journey"] = journey(model)
    return found | {"attention": attention()}


def passes(model: policy.Policy) -> dict:
    """The gradients and metrics of both mini-batches and of the first once more, and then the log-probs of every answer. The learning rate
    is 0, so that all are at the same weights, and scales of the last updates, where FP8 goes by them, are there by the third."""
    settings, gradients, asked = model.config.objective, [], []
    keep_gradients(model, gradients)
    _, mini_batches = micro_batches_of(model, made_up_groups())
    batches = [batch for mini in mini_batches for batch in mini]
    model.fill_old_logprobs(batches, settings)

    def objective(inputs):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return objectives.loss(inputs, settings=settings)

    updates = [model.update(mini, objective, objectives.METRICS) for mini in (*mini_batches, mini_batches[0])]
    model.fill_old_logprobs(batches, settings)  # once more: at first those scales are 1
    logprobs = {number: values.cpu() for batch in batches for number, values in old_logprobs(batch)}
    sequences = [sum(len(batch.answers) for batch in mini) / len(mini) for mini in mini_batches]
    return {"logprobs": logprobs, "gradients": gradients, "updates": updates, "deterministic": asked, "sequences": sequences}


def keep_gradients(model: policy.Policy, kept: list) -> None:
    """Append every update's gradients, under their Hugging Face names and without fp16's loss scale, on the host."""
    reduce = model.module.config.finalize_model_grads_func

    def reduce_and_keep(chunks, *args, **kwargs) -> None:
        reduce(chunks, *args, **kwargs)
        scale = float(model.optimizer.get_loss_scale()) if model.module.config.fp16 else 1.0
        named = tensors(model.gathered(lambda parameter: parameter.main_grad))
        kept.append({name: gradient.float().cpu() / scale for name, gradient in named.items()})

    model.module.config.finalize_model_grads_func = reduce_and_keep


def updates_by_adam(model: policy.Policy) -> dict:
    """The optimizer's float32 weights after some updates with made-up gradients, by Megatron's optimizer and by torch's AdamW in
    float64."""
    [one], g = model.optimizer.chained_optimizers, torch.Generator().manual_seed(7)
    named = dict(model.named_parameters())

    def weights() -> dict[str, torch.Tensor]:
        return {name: one._get_main_param_and_optimizer_states(p)["param"].detach().cpu().clone() for name, p in named.items()}

    wide = {name: torch.nn.Parameter(values.double()) for name, values in weights().items()}
    settings = model.config.optimizer
    torchs = torch.optim.AdamW(wide.values(), settings.lr, (settings.adam_beta1, settings.adam_beta2), settings.adam_eps,
                               settings.weight_decay)  # fmt: skip
    norms = []
    for update in range(ADAM_UPDATES):
        for name, parameter in named.items():
            gradient = torch.randn(parameter.shape, generator=g) * 10.0 ** (update - 4)  # the last ones are clipped
            parameter.main_grad.copy_(gradient)
            wide[name].grad = gradient.double().flatten()
        model.scheduler.step(increment=1)
        applied, norm, _ = model.optimizer.step()
        assert applied
        norms.append((float(norm), torch.nn.utils.clip_grad_norm_(wide.values(), settings.clip_grad).item()))
        torchs.step()
    rounded = {name: versions.values_of(p).detach().cpu().flatten() for name, p in named.items()}
    return {"mine": weights(), "theirs": {name: p.detach() for name, p in wide.items()}, "norms": norms, "weights": rounded}


def journey(model: policy.Policy) -> dict[str, object]:
    """What left the device in bytes, and whether each kind of state is bit for bit what it was."""
    storages = {kind: list(model._offload._storages(kind)) for kind in ("parameters", "optimizer")}
    before = {kind: [_bytes_of(s).cpu().clone() for s in found] for kind, found in storages.items()}
    occupied = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model._offload.leave(LEVELS["all"])
    left = sum(s.nbytes() for found in storages.values() for s in found)
    freed = occupied - torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model._come_back()
    same = {kind: all(map(torch.equal, before[kind], (_bytes_of(s).cpu() for s in found))) for kind, found in storages.items()}
    return {"left": left, "freed": freed, "bytes": sum(len(b) for found in before.values() for b in found), "same": same}


def attention() -> str:
    """Which of Transformer Engine's attentions ran last; empty without it."""
    engine = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    chosen = getattr(engine, "_attention_backends", {})
    kinds = {"use_flash_attention": "FlashAttention", "use_fused_attention": "cuDNN", "use_unfused_attention": "unfused"}
    return next((name for key, name in kinds.items() if chosen.get(key)), "")


def forget() -> None:
    """Let nothing of a case be there for the next one: its model, and the scales that FP8 keeps in one place for all models."""
    gc.collect()
    if engine := sys.modules.get("transformer_engine.pytorch.fp8"):
        engine.FP8GlobalStateManager.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
