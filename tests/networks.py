"""Networks that are trained in the process of a test, in seconds."""

from pipeline import checkpoint
from pipeline.config.cli import resolve
from pipeline.methods import OPTIONS
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train


def train_briefly(data: str, out: str, method: str = "suponly") -> str:
    """A checkpoint of the shapes dataset after a few steps: it sees more than one class."""
    values = {
        "method": method,
        "split": "1_4",
        "out": out,
        "data": {"root": data, "crop": [48, 48], "scale": [0.85, 1.2]},
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
        "optim": {"optimizer": "adamw", "lr": 3e-3, "head_lr_mult": 1, "steps": 60, "batch_labeled": 4},
        "eval": {"every": 1000},
        "run": {"checkpoint_every": 1000, "tensorboard": False},
    }
    train(resolve(values, OPTIONS), PlainRuntime(out))
    return checkpoint.find(out)
