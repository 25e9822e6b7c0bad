"""Networks: a dilated torchvision encoder or a tiny one from scratch, a decoder, and the heads of U2PL."""

from pipeline.models.network import SegmentationModel, build_model
from pipeline.models.parts import Prediction, Taps
from pipeline.ops.grid import upsample

__all__ = ["Prediction", "SegmentationModel", "Taps", "build_model", "upsample"]
