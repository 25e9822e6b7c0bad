"""What a wrong flag was meant to be: nearly the same letters, a key without its section, or another program's word."""

from collections.abc import Sequence
from difflib import get_close_matches

ELSEWHERE = {
    **dict.fromkeys(("epochs", "epoch", "iters", "iterations", "max_iter", "max_iters", "num_steps"), "optim.steps"),
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr"),
    **dict.fromkeys(("batch_size", "bs"), "batch"),
    **dict.fromkeys(("gpus", "gpu", "num_gpus", "ngpu", "devices", "num_workers", "nproc_per_node"), "scaling.workers"),
    **dict.fromkeys(("crop_size", "image_size", "img_size", "imgsz", "size"), "data.crop"),
    **dict.fromkeys(("arch", "model", "encoder", "network"), "model.backbone"),
    **dict.fromkeys(("pretrained", "init"), "model.weights"),
    **dict.fromkeys(("dataset", "data_dir", "data_root", "data_path"), "data"),
    **dict.fromkeys(("output", "output_dir", "out_dir", "save_dir", "work_dir", "save_path", "name"), "out"),
    **dict.fromkeys(("amp", "fp16", "bf16", "half"), "run.precision"),
    **dict.fromkeys(("accum", "gradient_accumulation_steps", "accumulate_grad_batches"), "optim.accumulate"),
    **dict.fromkeys(
        ("grad_checkpoint", "gradient_checkpointing", "activation_checkpointing"), "model.checkpoint_activations"
    ),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("labeled", "labels", "num_labels", "label_ratio"), "split"),
    **dict.fromkeys(("eval_every", "val_every", "eval_interval"), "eval.every"),
}
"""Flags, without their dashes, by the words that other programs have for them."""
RESUME = ("resume", "continue", "auto_resume", "restart")


def hint(argument: str, flags: Sequence[str]) -> str:
    """The end of an error line about an unknown argument: what was meant, or an empty string.

    Args:
        argument: as it was typed, perhaps with `=` and a value.
        flags: those that there are, with their dashes.
    """
    word = argument.partition("=")[0].lstrip("-").replace("-", "_").lower()
    if not (argument.startswith("-") or "=" in argument) or not word:
        return ""
    if word in RESUME and "--fresh" in flags:
        return "; there is no need: the same command with the same --out goes on where it was cut off"
    keys = {flag: flag.lstrip("-") for flag in flags}
    last = {flag: key.rpartition(".")[2] for flag, key in keys.items()}
    found = (
        [flag for flag, key in keys.items() if key == ELSEWHERE.get(word)]
        or [flag for flag in flags if word in (keys[flag], last[flag])]
        or get_close_matches(f"--{word}", flags, n=1)
        or [flag for flag in flags if last[flag] in get_close_matches(word, [*last.values()], n=1, cutoff=0.75)]
    )
    return f"; did you mean {' or '.join(found)}?" if found else ""
