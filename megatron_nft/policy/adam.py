"""AdamW with the calling convention of the fused GPU ones."""

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """torch's AdamW arithmetic with the step count in the param group, where Apex's and Transformer Engine's FusedAdam keep it.

    Megatron's distributed optimizer saves and loads that layout; with torch's own (a step tensor per parameter) a
    checkpoint of the optimizer does not load.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported")
        if capturable:
            raise ValueError("there are no CUDA graphs on a CPU")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self, closure=None, fused: bool | None = None):
        """One update of every parameter that has a gradient, by one fused kernel on CUDA (or as `fused` says)."""
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # torch's function counts the step itself, from a tensor per parameter
            in_one = fused if fused is not None else bool(params) and params[0].is_cuda
            where = params[0].device if in_one else "cpu"  # the fused kernel wants the step beside the parameters
            steps = [torch.tensor(float(group["step"] - 1), device=where) for _ in params]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                foreach=not in_one,
                fused=in_one,
            )
