"""PseudoSeg (Zou et al., ICLR 2021): pseudo-labels from the decoder and from refined class activation maps.

L = L_s + L_att + L_cls + L_u. A classifier of whole images, trained on the labeled ones, localises classes by its
activation maps (CAM), and self-attention over the encoder's features spreads them. Fused with the decoder's logits of
the weak view they are the soft labels of the strong view. Code: googleinterns/wss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Views
from pipeline.config.options import PseudoSegOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import FeatureMaps, SegmentationModel, upsample
from pipeline.ops.grid import shrink
from pipeline.ops.losses import cross_entropy, soft_cross_entropy
from pipeline.ops.mixing import cutout
from pipeline.ops.world import World


def calibrated_fusion(decoder: Tensor, attention: Tensor, temperature: float, world: World) -> Tensor:
    """Soft pseudo-labels of two logit maps: brought to one scale, averaged, sharpened (paper eq. 3 and 4).

    Both are divided by the root mean square of all their values, over the images of all ranks, as their scales differ
    by nature; then q = (softmax z + softmax a) / 2 and q_c^(1/T) / sum.

    Args:
        decoder: float32 [B,C,h,w], logits z.
        attention: float32 [B,C,h,w], logits a.
        temperature: T, below 1 sharpens.
        world: ranks that share the scale.

    Returns:
        float32 [B,C,h,w], detached, sums to 1.
    """
    both = torch.stack([decoder, attention]).detach()
    square = world.sum(both.square().mean()) / world.size
    fused = (both * torch.rsqrt(square + 1e-8)).softmax(2).mean(0)
    return (fused.log() / temperature).softmax(1)


class PseudoSeg(Method):
    """A segmentation network, an image classifier and an attention; the last two are used in training alone."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(PseudoSegOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.student = self.build_network(features=False)
        channels = self.student.encoder.channels
        self.cam = AttentiveCAM(
            channels.mid, channels.high, num_classes, self.options.attention_dim, background=self.background
        )

    def networks(self) -> dict[str, SegmentationModel]:
        """The plain segmentation network."""
        return {"student": self.student}

    def param_groups(self) -> list[dict[str, object]]:
        """Classifier and attention learn as fast as the decoder."""
        heads = {"params": list(self.cam.parameters()), "lr_mult": self.config.optim.head_lr_mult}
        return [*super().param_groups(), heads]

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s + L_att + L_cls on labeled images, L_u on the strong view of unlabeled ones."""
        labeled, unlabeled = self.sides(batch)
        target = self.pseudo_labels(unlabeled, step.world)
        strong, valid = self.strong(unlabeled, step)
        maps = self.forward_groups(self.student.encode, labeled.image, strong)
        of_labeled, prediction = self.forward_groups(self.student.decode, *maps)
        with torch.autocast(strong.device.type, enabled=False):
            attention, classifier = self._labeled_losses(maps[0].changed(lambda _, each: each.float()), labeled, step)
            grid = (target.shape[2], target.shape[3])
            consistency = soft_cross_entropy(prediction.logits, target, shrink(valid, grid), step.world)
        terms = {
            "supervised": self.supervised(of_labeled, labeled, step.world),
            "attention": self.options.head_weight * attention,
            "classifier": self.options.head_weight * classifier,
            "consistency": self.options.weight * consistency,
        }
        return Losses(terms, {"confidence": target.amax(1).mean()})

    @torch.no_grad()
    def pseudo_labels(self, unlabeled: Views, world: World) -> Tensor:
        """Soft labels of the weak view at the size of the logits: float32 [B,C,h,w] (paper eq. 4)."""
        maps = self.student.encode(unlabeled.image)
        logits = self.student.decode(maps).logits.float()
        with torch.autocast(logits.device.type, enabled=False):
            maps = maps.changed(lambda _, each: each.float())
            present = self.cam.logits(maps.high).sigmoid() >= self.options.present
            refined = self.cam(maps, present, unlabeled.valid)
        refined = upsample(refined, (logits.shape[2], logits.shape[3]))
        return calibrated_fusion(logits, refined, self.options.temperature, world)

    def strong(self, unlabeled: Views, step: Step) -> tuple[Tensor, Tensor]:
        """The strong view with a hole, and where it shows the image: uint8 [B,3,H,W] and bool [B,H,W]."""
        image = unlabeled.strong[0]
        draws = step.uniform_per_image("pseudoseg/cutout", (len(image), 2), image.device)
        hole = cutout(draws, unlabeled.size, self.options.cutout)
        blank = self.student.mean.round().to(image.dtype)  # about 0 after normalisation, as in padding
        return torch.where(hole.unsqueeze(1), blank, image), unlabeled.valid & ~hole

    def _labeled_losses(self, maps: FeatureMaps, labeled: Views, step: Step) -> tuple[Tensor, Tensor]:
        """L_att, cross entropy of the refined maps of the classes that are present; L_cls, of the image classifier."""
        truth = labeled.truth
        classes = torch.arange(self.num_classes, device=truth.device).view(1, -1, 1, 1)
        present = (truth.unsqueeze(1) == classes).flatten(2).any(2)
        if self.background is not None:
            present = torch.cat([present[:, : self.background], present[:, self.background + 1 :]], 1)
        refined = upsample(self.cam(maps, present, labeled.valid), (truth.shape[1], truth.shape[2]))
        logits = self.cam.logits(maps.high)
        return (
            cross_entropy(refined, truth, step.world),
            F.binary_cross_entropy_with_logits(logits, present.float()),
        )


class AttentiveCAM(nn.Module):
    """An image classifier, and self-attention that refines its activation maps.

    K classes are objects: all C, or C-1 where one is the background, whose map is computed from those of the others.

    Args:
        mid: channels of `FeatureMaps.mid`.
        high: channels of `FeatureMaps.high`.
        classes: C.
        dim: channels of queries and keys.
        background: the background class, or None.
    """

    def __init__(self, mid: int, high: int, classes: int, dim: int, background: int | None) -> None:
        super().__init__()
        self.background = background
        self.classifier = nn.Linear(high, classes - (background is not None))
        self.query = nn.Conv2d(mid + high, dim, 1, bias=False)
        self.key = nn.Conv2d(mid + high, dim, 1, bias=False)
        self.merge = nn.Sequential(nn.Conv2d(classes, classes, 1, bias=False), nn.BatchNorm2d(classes))

    def logits(self, high: Tensor) -> Tensor:
        """The image classifier: float [B,c,h,w] to logits [B,K], positive where an object is likely present."""
        return self.classifier(high.mean((2, 3)))

    def activation(self, high: Tensor, present: Tensor) -> Tensor:
        """Activation maps of the objects that are present, 0..1, detached: [B,K,h,w].

        The release's Grad-CAM takes K gradients of the logits. Behind mean pooling and a linear layer they are that
        layer's weights, divided by h*w; the division by the largest value removes that factor.

        Args:
            high: float [B,c,h,w].
            present: bool [B,K], which objects an image shows.
        """
        maps = F.conv2d(high.detach(), self.classifier.weight.detach()[:, :, None, None]).relu()
        maps = maps * present[..., None, None]
        return maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-5)

    def forward(self, maps: FeatureMaps, present: Tensor, valid: Tensor) -> Tensor:
        """Refined activation maps as logits [B,C,h,w]; the gradient goes to attention and merge alone (paper eq. 2).

        Args:
            maps: float32 feature maps.
            present: bool [B,K], which objects an image shows.
            valid: bool [B,H,W]; padding is not attended to.
        """
        activation = self.activation(maps.high, present)
        size = (activation.shape[2], activation.shape[3])
        column = torch.cat([upsample(maps.mid, size), maps.high], 1).detach()
        query, key, value = (x.flatten(2).transpose(1, 2) for x in (self.query(column), self.key(column), activation))
        hidden = torch.where(shrink(valid, size).flatten(1), 0.0, -1e9)[:, None, :]  # finite: all may be hidden
        spread = F.scaled_dot_product_attention(query, key, value, attn_mask=hidden)
        refined = spread.transpose(1, 2).unflatten(2, size) + activation
        if self.background is None:
            return self.merge(refined)
        rest = 2.0 - refined.amax(1, keepdim=True)  # with the shortcut a map reaches 2
        return self.merge(torch.cat([refined[:, : self.background], rest, refined[:, self.background :]], 1))
