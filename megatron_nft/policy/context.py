"""Context parallelism: which slots of a packed micro-batch a rank holds, and gathering what the ranks hold.

Each sequence is cut into 2 x size slices of one length; rank r holds slices r and 2 x size - 1 - r of it, so that under causal attention
all ranks work alike. This is the layout that Megatron-Core's rotary embedding and Transformer Engine's attention expect of packed input.
"""

import torch
import torch.distributed as dist


def slots(cu_seqlens: torch.Tensor, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Slots that a rank holds, in its order: int64 [tokens / size]. cu_seqlens [sequences + 1]: multiples of 2 x size. device: of the
    result, by default that of cu_seqlens."""
    device, bounds = device or cu_seqlens.device, cu_seqlens.cpu().long()
    total, longest = int(bounds[-1]), int((bounds[1:] - bounds[:-1]).max())
    if size == 1:
        return torch.arange(total, device=device)
    starts, width = bounds[:-1, None], (bounds[1:, None] - bounds[:-1, None]) // (2 * size)  # [sequences, 1]
    offsets = torch.arange(-(-longest // (2 * size)))
    slices = [starts + width * s + offsets for s in (rank, 2 * size - 1 - rank)]  # [sequences, slots of a slice]
    real = (offsets < width)[:, None].expand(-1, 2, -1)
    return torch.stack(slices, 1)[real].to(device)


class Places:
    """The slots of every context-parallel rank for one micro-batch."""

    def __init__(self, cu_seqlens: torch.Tensor, group: dist.ProcessGroup | None, device: torch.device | None = None):
        """group: the context-parallel ranks; None: this rank alone. device: where the slots are used, by default that of cu_seqlens."""
        self.group = group
        self.cu_seqlens = cu_seqlens.to(device)
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        of_ranks = [slots(cu_seqlens, rank, self.size, device) for rank in range(self.size)]
        self.own = of_ranks[self.rank]  # [tokens / size]
        if self.size > 1:
            self.order = torch.cat(of_ranks)  # [tokens]
            self.back = torch.argsort(self.order)  # [tokens]

    def gather(self, values: torch.Tensor, shared: bool = False) -> torch.Tensor:
        """This rank's values [tokens / size, ...] -> those of all slots [tokens, ...], differentiable.

        shared: every rank goes on with a part of the work (attention's keys and values), so the gradient is summed over the ranks.
        Otherwise every rank goes on with the same work, and the gradient is what it found for its own slots.
        """
        return values if self.size == 1 else _Gather.apply(values, self, shared)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, places: Places, shared: bool):
        ctx.places, ctx.shared = places, shared
        gathered = values.new_empty(places.size * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=places.group)
        return gathered[places.back]

    @staticmethod
    def backward(ctx, grad):
        places = ctx.places
        if not ctx.shared:
            return grad[places.own], None, None
        own = grad.new_empty(len(places.own), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad[places.order], group=places.group)
        return own, None, None
