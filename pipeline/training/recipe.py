"""Naive self-training in three stages: train a teacher, label the dataset's unlabeled images, train a new student.

Each stage leaves its result below the run directory, so a recipe that was cut off goes on where it was:

    RUN/teacher          a SupOnly run
    RUN/pseudo_labels    the labels that its last checkpoint gives the unlabeled images
    RUN/student          the run of method `self_training`: the result
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline import checkpoint, storage
from pipeline.checkpoint import STUDENT, TEACHER, Progress
from pipeline.config.options import SelfTrainingOptions, SupOnlyOptions
from pipeline.config.schema import Config
from pipeline.datasets.prepared import pseudo
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.training.launch import delete_run, launch
from pipeline.training.lease import held
from pipeline.training.preflight import check_identity, resolve, resolve_paths


def self_train(config: Config, *, fresh: bool = False, callbacks: Sequence[Any] = (), grace: float = 0.0) -> Progress:
    """Runs the recipe.

    The teacher is its *last* checkpoint: the best one would already be chosen on the validation set.

    Args:
        config: of teacher and student alike; its method is `self_training`.
        fresh: delete what the stages left and start anew.
        callbacks: `ray.train.UserCallback`s that are told of the student's checkpoints.
        grace: seconds in which another job that runs the recipe may still end.

    Returns:
        The scores of the student.

    Raises:
        UserError: as `launch`, or other pseudo-labels are in the way.
    """
    config = resolve_paths(config)
    with held(str(config.out), Patience(config.run.storage_patience), grace):
        return _stages(config, fresh, callbacks)


def _stages(config: Config, fresh: bool, callbacks: Sequence[Any]) -> Progress:
    labels, student = (storage.join(str(config.out), part) for part in ("pseudo_labels", STUDENT))
    print("stage 1 of 3: the teacher")
    teacher = _teacher(config)
    if fresh:  # the last stage first: what a kill leaves must not pass for the result of the new teacher
        resolve(teacher, fresh=True)
        delete_run(student)
        pseudo.delete_labels(labels)
    launch(teacher, fresh=fresh)
    print("\nstage 2 of 3: the teacher's labels of the unlabeled images")
    from pipeline.inference.label import Labeling, label_unlabeled  # torch, which the other stages' drivers do without

    options = config.options_of(SelfTrainingOptions)
    newest = checkpoint.find(str(teacher.out))
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split, config.data.protocol)
    info = label_unlabeled(Labeling(dataset.root, newest, options.tta, options.keep), split, labels)
    print(f"{info.images} images labeled in {labels}\n\nstage 3 of 3: the student")
    config = replace(config, out=student, data=replace(config.data, pseudo_labels=labels))
    return launch(config, callbacks=callbacks)


def check_recipe(config: Config) -> None:
    """Refuses a recipe that cannot be run, as far as can be seen before its first stage; changes nothing.

    Raises:
        UserError: it cannot.
    """
    if config.data.unlabeled_pools:
        raise UserError("data.unlabeled_pools: self-training labels the dataset's own images; leave the pools out")
    check_identity(resolve(_teacher(config)).config)


def _teacher(config: Config) -> Config:
    options = {"suponly": SupOnlyOptions()}
    scored = replace(config.eval, patience=0)  # it would choose the teacher's last checkpoint on the validation set
    return replace(config, method="suponly", options=options, eval=scored, out=storage.join(str(config.out), TEACHER))
