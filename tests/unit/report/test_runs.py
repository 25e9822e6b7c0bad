import json

import pytest

from pipeline.checkpoint import Score
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.report.runs import find_runs, read_run
from tests.unit.report.made import MACHINE, write_run


def test_runs_are_found_alone_and_below_folders_each_once(tmp_path):
    for name in ("a", "b", "deep/c"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    root = str(tmp_path / "runs")
    expected = [f"{root}/a", f"{root}/b", f"{root}/deep/c"]
    assert find_runs([root]) == expected
    assert find_runs([f"{root}/b/", root]) == [expected[1], expected[0], expected[2]]
    assert find_runs([f"{root}/a"]) == expected[:1]


def test_a_teacher_is_part_of_its_students_run_and_cost(tmp_path):
    recipe = tmp_path / "runs/recipe"
    write_run(recipe / "teacher", scores=(0.4, 0.5))
    assert find_runs([str(tmp_path)]) == [str(recipe / "teacher")], "the student has not begun"
    labels = {"data": {"root": "/no/toy", "pseudo_labels": str(recipe / "pseudo_labels")}}
    student = write_run(recipe / "student", "self_training", scores=(0.5,), config=labels)
    assert find_runs([str(tmp_path)]) == [student]
    assert find_runs([str(recipe / "teacher")]) == [str(recipe / "teacher")]
    assert read_run(student, OPTIONS).cost == (3.0, "CPU-hours")  # two evaluations and one


def test_a_run_as_it_was_left(tmp_path):
    logs = {"kept": 0.8, "bank_fill": [0.5, 1.0]}
    run = read_run(write_run(tmp_path / "r", "u2pl", "1_2", 3, (0.5, 0.7, 0.6), logs=logs), OPTIONS)
    assert (run.config.method, run.config.split, run.config.seed, run.config.optim.steps) == ("u2pl", "1_2", 3, 100)
    assert run.progress.last == Score(30, {"teacher": 0.6, "student": 0.0}, [0.7, 0.5])
    assert run.progress.best is not None
    assert (run.progress.best.step, run.progress.best.value, run.finished) == (20, 0.7, True)
    assert [score.value for score in run.scores()] == [0.5, 0.7, 0.6]
    assert run.curve("kept") == [(10, 0.8), (20, 0.8), (30, 0.8)]
    assert run.curve("bank_fill")[0] == (10, 0.75)
    assert run.curve("alpha") == []
    assert run.cost == (3.0, "CPU-hours")
    about = run.about
    assert (about.dataset, about.protocol, about.labeled, about.unlabeled) == ("toy", "random", 200, 200)
    assert (about.digest, about.classes, about.version, about.workers) == ("list-1_2", ("sky", "road"), "1.0", 2)
    assert about.machine == MACHINE


def test_an_unfinished_run_has_the_score_of_its_records(tmp_path):
    run = read_run(write_run(tmp_path / "r", scores=(0.5, 0.7, 0.6), finished=False), OPTIONS)
    assert run.progress.last is not None
    assert run.progress.best is not None
    assert (run.progress.step, run.progress.last.value, run.progress.best.value) == (30, 0.6, 0.7)
    assert not run.finished


def test_a_run_that_has_hardly_begun(tmp_path):
    run = read_run(write_run(tmp_path / "r", scores=(), finished=False, data={}), OPTIONS)
    (tmp_path / "r" / "metrics.jsonl").unlink()
    assert read_run(run.uri, OPTIONS).records == []
    assert (run.progress.step, run.progress.last, run.cost) == (0, None, None)
    assert (run.about.dataset, run.about.protocol, run.about.index) == ("toy", "default", None)


def test_what_an_older_version_did_not_record_comes_from_the_dataset(tmp_path, shapes):
    config = {"data": {"root": shapes}}
    place = write_run(tmp_path / "r", split="1_8", config=config, data={})
    metrics = tmp_path / "r" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("worker_seconds", "other"))
    run = read_run(place, OPTIONS)
    assert (run.about.dataset, run.about.protocol, run.about.labeled, run.about.unlabeled) == (
        "shapes", "random", 50, 350,
    )  # fmt: skip
    assert run.about.index is not None
    assert run.cost is None
    assert run.about.workers is None


@pytest.mark.parametrize(
    ("about", "cost"),
    [
        ({"worker_cpus": 4.0, "worker_gpus": 1.0}, (1.0, "GPU-hours")),
        ({"worker_cpus": 4.0, "worker_gpus": 0.5}, (0.5, "GPU-hours")),
        ({"worker_cpus": 4.0, "worker_gpus": 0.0}, (4.0, "CPU-hours")),
        ({"worker_cpus": None, "worker_gpus": None}, (1.0, "worker-hours")),  # an older version's
    ],
)
def test_cost(tmp_path, about, cost):
    assert read_run(write_run(tmp_path / "a", about=about), OPTIONS).cost == cost


class TestMistakes:
    """One line each: what is wrong, where, and what to do."""

    def test_no_run(self, tmp_path):
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(UserError, match=r"no run there \(config.yaml is missing\); name runs, or folders"):
                find_runs([str(place)])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: 1", "unknown key 'a'"),
            ("methods: {}", "written by an older version"),
            ("method: magic", "unknown method 'magic'"),
            ("[", "not valid"),
        ],
    )
    def test_no_config_of_a_run(self, tmp_path, text, said):
        place = write_run(tmp_path / "r")
        (tmp_path / "r" / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"r/config\.yaml.*{said}"):
            read_run(place, OPTIONS)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"step": 1, "last": null, "best": null}', '{"step": 1, "last": {"miou": {}}}']
    )
    def test_a_damaged_summary(self, tmp_path, text):
        place = write_run(tmp_path / "r")
        (tmp_path / "r" / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"summary\.json: damaged \(.*\); remove it and give the run's command"):
            read_run(place, OPTIONS)

    @pytest.mark.parametrize("line", ["{", "3", "{}", '{"kind": "train"}', '{"kind": "eval", "step": 1, "miou": {}}'])
    def test_a_damaged_record(self, tmp_path, line):
        place = write_run(tmp_path / "r")
        with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
            file.write(f"{line}\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is damaged"):
            read_run(place, OPTIONS)

    def test_a_damaged_checkpoint(self, tmp_path):
        place = write_run(tmp_path / "r")
        (tmp_path / "r" / "step_0000010" / "checkpoint.json").write_text(json.dumps({"step": 1}))
        with pytest.raises(UserError, match=r"checkpoint\.json: not readable"):
            read_run(place, OPTIONS)
