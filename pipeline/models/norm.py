"""Batch norm over the images of all workers, on GPUs and on CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_PIXELS = (0, 2, 3)


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replaces each BatchNorm2d of `model` by one whose training statistics are those of all workers' images.

    Parameters and buffers are kept, under the same state_dict keys. Call it when the model is on its device:
    on CUDA the replacement is torch's SyncBatchNorm, which rejects CPU tensors, elsewhere the one below. In one
    process both are plain batch norm.

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


def _converted(bn: nn.BatchNorm2d) -> nn.Module:
    kind = nn.SyncBatchNorm if bn.weight.is_cuda else SyncBatchNorm2d
    sync = kind(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
    sync.weight, sync.bias = bn.weight, bn.bias
    sync.running_mean, sync.running_var = bn.running_mean, bn.running_var
    sync.num_batches_tracked = bn.num_batches_tracked
    return sync.train(bn.training)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [B,C,h,w] float over all workers; any device and backend, B may differ between workers.

    In eval mode, and with one worker, it is BatchNorm2d itself, bit for bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises float [B,C,h,w]; in training it moves the running statistics, under no_grad too."""
        workers = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or workers == 1:
            return super().forward(input)
        mean, var, count = _global_statistics(input)
        self._track(mean, var * (count / (count - 1)))
        return _Normalise.apply(input, self.weight, self.bias, mean, var, count, self.eps)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - momentum).add_(mean * momentum)
        self.running_var.mul_(1 - momentum).add_(unbiased * momentum)


@torch.no_grad()
def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of pixels (0-dim) over all workers; one collective.

    Means and variances are merged, not sums of squares, which cancel in float32 where |mean| >> deviation.
    """
    channels, pixels = x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    mean, var = torch.batch_norm_update_stats(_wide(x), None, None, 0.0)  # several times as fast as var_mean
    local = torch.cat([mean, var, mean.new_tensor([pixels])])
    gathered = local.new_empty(dist.get_world_size(), local.numel())
    dist.all_gather(list(gathered.unbind()), local)
    means, variances, counts = gathered.split([channels, channels, 1], dim=1)
    count = counts.sum()
    share = counts / count
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), count


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: sums of bfloat16 lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on the x of all workers."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        """y, [B,C,h,w]; saves x, weight, mean, var and count."""
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps  # type: ignore[attr-defined]
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient by x of the losses of all workers; by weight and bias of this worker's loss, which DDP averages."""
        x, weight, mean, var, count = ctx.saved_tensors  # type: ignore[attr-defined]
        eps: float = ctx.eps  # type: ignore[attr-defined]
        # as if mean and var were constants ...
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, eps, [True, True, True]
        )
        # ... and through them: -weight * scale * (offset + slope * (x - mean) * scale)
        total = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(total)
        slope, offset = total / count
        scale = torch.rsqrt(var + eps)
        linear = -weight * slope * scale.square()
        constant = -weight * offset * scale - linear * mean
        shape = (1, -1, 1, 1)
        grad_x = direct + torch.addcmul(constant.view(shape), linear.view(shape), x)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None
