"""Batch norm over the images of all workers, on GPUs and on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.ops.world import World


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replaces each BatchNorm2d of `model` by a SyncBatchNorm2d: its training statistics are of all workers' images.

    Parameters and buffers are kept, under the same state_dict keys.

    Returns:
        The model, changed in place unless it is a BatchNorm2d itself.
    """
    if isinstance(model, nn.BatchNorm2d) and not isinstance(model, SyncBatchNorm2d | FrozenBatchNorm2d):
        return _converted(model)
    for name, child in model.named_children():
        setattr(model, name, sync_batchnorm(child))
    return model


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that keeps the running statistics it has, in training too; its weight and bias learn."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stays in evaluation mode, whatever `mode` says."""
        del mode
        return super().train(False)


def freeze_batchnorm(model: nn.Module) -> None:
    """Makes each BatchNorm2d below `model` a frozen one, in place, under the same state_dict keys."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps, child.momentum)
            frozen.load_state_dict(child.state_dict())
            setattr(model, name, frozen.train())
        else:
            freeze_batchnorm(child)


def _converted(bn: nn.BatchNorm2d) -> "SyncBatchNorm2d":
    sync = SyncBatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
    sync.weight, sync.bias = bn.weight, bn.bias
    sync.running_mean, sync.running_var = bn.running_mean, bn.running_var
    sync.num_batches_tracked = bn.num_batches_tracked
    return sync.train(bn.training)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [B,C,h,w] float over all workers; any device and backend, B >= 1 may differ between workers.

    In eval mode, and with one worker, it is BatchNorm2d itself, bit for bit. It never waits for the device.
    torch.nn.SyncBatchNorm does: it leaves out workers without images, by a mask, and we have none.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises float [B,C,h,w]; in training it moves the running statistics, under no_grad too."""
        if not self.training or World.current().size == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        normalise = _FusedNormalise if _is_fused(input) else _Normalise
        return normalise.apply(  # type: ignore[no-any-return]
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )


def _is_fused(x: Tensor) -> bool:
    """Whether torch has kernels for batch norm over several workers on the device of `x`."""
    return x.is_cuda


# ---- with CUDA's kernels ------------------------------------------------------------------------------------------


class _FusedNormalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on the x of all workers.

    Each kernel passes over `x` once and adds up in float32, also where `x` is bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """y, [B,C,h,w] in the dtype of `x`; moves the running statistics; one collective of 2C + 1 numbers."""
        x, channels = _dense(x), x.shape[1]
        mean, scale = torch.batch_norm_stats(x, eps)  # scale: 1 / sqrt(var + eps)
        pixels = mean.new_full((1,), x.numel() // channels)
        gathered = World.current().gather(torch.cat([mean, scale, pixels]))
        means, scales, counts = gathered.split([channels, channels, 1], dim=1)
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, running_mean, running_var, momentum, eps, counts[:, 0]
        )
        ctx.save_for_backward(x, weight, mean, scale, counts[:, 0].int())
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """As that of `_Normalise`."""
        x, weight, mean, scale, counts = ctx.saved_tensors
        grad = _dense(grads[0])
        total, dotted, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, scale, weight, True, True, True
        )
        sums = torch.cat([total, dotted])
        dist.all_reduce(sums)
        total, dotted = sums.split(len(mean))
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, scale, weight, total, dotted, counts)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """`x` in channels-last layout if it is that, else contiguous: the kernels know no other."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


# ---- with what every device has ---------------------------------------------------------------------------------


class _Normalise(torch.autograd.Function):
    """As `_FusedNormalise`, from functions that every device has."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """y, [B,C,h,w]; moves the running statistics."""
        mean, var, count = _global_statistics(x)
        running_mean.mul_(1 - momentum).add_(mean * momentum)
        running_var.mul_(1 - momentum).add_(var * (count / (count - 1)) * momentum)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradient by x of the losses of all workers; by weight and bias of this worker's loss, which DDP averages."""
        x, weight, mean, var, count = ctx.saved_tensors
        # as if mean and var were constants ...
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # ... and through them: -weight * scale * (offset + slope * (x - mean) * scale)
        total = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(total)
        slope, offset = total / count
        scale = torch.rsqrt(var + ctx.eps)
        linear = -weight * slope * scale.square()
        constant = -weight * offset * scale - linear * mean
        shape = (1, -1, 1, 1)
        grad_x = direct + torch.addcmul(constant.view(shape), linear.view(shape), x)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of pixels (0-dim) over all workers; one collective.

    Means and variances are merged, not sums of squares, which cancel in float32 where |mean| >> deviation.
    """
    channels, pixels = x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    mean, var = torch.batch_norm_update_stats(_wide(x), None, None, 0.0)  # several times as fast as var_mean
    gathered = World.current().gather(torch.cat([mean, var, mean.new_full((1,), pixels)]))
    means, variances, counts = gathered.split([channels, channels, 1], dim=1)
    count = counts.sum()
    share = counts / count
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), count


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: sums of bfloat16 lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
