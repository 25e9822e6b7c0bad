"""Networks: encoders and decoders, one file a family (`config/backbones.py` lists them), and the heads of U2PL."""

from pipeline.models.network import Scale, SegmentationModel, build_model
from pipeline.models.parts import FeatureMaps, Prediction
from pipeline.ops.grid import upsample

__all__ = ["FeatureMaps", "Prediction", "Scale", "SegmentationModel", "build_model", "upsample"]
