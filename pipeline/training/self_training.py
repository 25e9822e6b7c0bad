"""Naive self-training, the three stages one after the other: train a teacher, label the pool, train a student anew.

Each stage leaves its result below the run directory, so a recipe that was cut off goes on where it was:

    RUN/teacher          a SupOnly run
    RUN/pseudo_labels    what its last checkpoint sees in the unlabeled images
    RUN/student          the run of method `self_training`: the result
"""

from dataclasses import replace

from pipeline import checkpoint, storage
from pipeline.checkpoint import Progress
from pipeline.config import Config, as_dict
from pipeline.datasets import pseudo
from pipeline.datasets.format import open_dataset
from pipeline.datasets.splits import load_split
from pipeline.inference.label import Recipe, label_pool
from pipeline.methods.self_training import SelfTrainingOptions
from pipeline.training.launch import launch, placed
from pipeline.typed import convert


def self_train(config: Config, *, fresh: bool = False) -> Progress:
    """Runs the recipe; `config.method` does not matter.

    The teacher is its *last* checkpoint: the best one would already be chosen on the validation set.

    Args:
        config: of teacher and student alike.
        fresh: delete what the stages left and start anew.

    Raises:
        UserError: as `launch`, or other pseudo-labels are in the way.
    """
    config = placed(replace(config, method="self_training"))
    teacher, labels, student = (storage.join(str(config.out), part) for part in ("teacher", "pseudo_labels", "student"))
    print("stage 1 of 3: the teacher")
    unasked = {**config.methods, "self_training": as_dict(SelfTrainingOptions())}  # other ones make no other teacher
    launch(replace(config, method="suponly", out=teacher, methods=unasked), fresh=fresh)
    print("\nstage 2 of 3: the teacher's labels of the pool")
    if fresh:
        pseudo.delete_labels(labels)
    options: SelfTrainingOptions = convert(SelfTrainingOptions, config.methods["self_training"], "self_training")
    newest = checkpoint.find(teacher)
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split, config.data.protocol)
    info = label_pool(Recipe(dataset.root, newest, options.tta, options.keep), split, labels)
    print(f"{info.images} images labeled in {labels}\n\nstage 3 of 3: the student")
    return launch(replace(config, out=student, data=replace(config.data, pseudo_labels=labels)), fresh=fresh)
