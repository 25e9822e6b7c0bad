"""U2PL on Ray: semi-supervised semantic segmentation, from object storage to an evaluated checkpoint."""

__version__ = "0.1.0"
