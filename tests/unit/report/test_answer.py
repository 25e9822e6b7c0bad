"""The sentences that a report begins with: what came out, and how far it can be trusted."""

from pipeline.report.answer import answers
from tests.unit.report.made import only, write_run


def test_gain_with_its_interval_and_the_labels(tmp_path):
    for seed, (base, own) in enumerate([(0.5, 0.6), (0.6, 0.71), (0.55, 0.65)]):
        write_run(tmp_path / f"s{seed}", seed=seed, scores=(base,))
        write_run(tmp_path / f"u{seed}", "u2pl", seed=seed, scores=(own,))
    assert answers(only(tmp_path)) == [
        "u2pl 65.33 against 55.00 of suponly: +10.33 points of mIoU with 100 labeled images "
        "(3 seeds, 95 % interval +8.90 to +11.77)."
    ]


def test_an_interval_that_holds_0_is_said(tmp_path):
    for seed, (base, own) in enumerate([(0.5, 0.6), (0.6, 0.59)]):
        write_run(tmp_path / f"s{seed}", seed=seed, scores=(base,))
        write_run(tmp_path / f"u{seed}", "u2pl", seed=seed, scores=(own,))
    (said,) = answers(only(tmp_path))
    assert said.endswith("(2 seeds, 95 % interval -65.41 to +74.41: it holds 0, so more seeds are needed).")


def test_one_seed_has_no_interval(tmp_path):
    write_run(tmp_path / "s")
    write_run(tmp_path / "u", "u2pl", scores=(0.6,))
    (said,) = answers(only(tmp_path))
    assert said.endswith("+10.00 points of mIoU with 100 labeled images (one seed: another one may say otherwise).")


def test_both_means_are_over_the_seeds_that_both_have(tmp_path):
    for seed, score in enumerate((0.5, 0.9)):
        write_run(tmp_path / f"s{seed}", seed=seed, scores=(score,))
    write_run(tmp_path / "u", "u2pl", scores=(0.6,))
    (said,) = answers(only(tmp_path))
    assert said.startswith("u2pl 60.00 against 50.00 of suponly: +10.00 points")
    assert said.endswith("Best of all: suponly 70.00 mIoU (± 28.28, 2 seeds).")


def test_another_method_that_is_better_is_named(tmp_path):
    for method, score in (("suponly", 0.5), ("u2pl", 0.6), ("cps", 0.7)):
        write_run(tmp_path / method, method, scores=(score,))
    (said,) = answers(only(tmp_path))
    assert said.startswith("u2pl 60.00 against 50.00")
    assert said.endswith(" Best of all: cps 70.00 mIoU (one seed).")


def test_one_sentence_for_each_split_that_has_a_finished_run(tmp_path):
    write_run(tmp_path / "a", "u2pl", "1_8")
    write_run(tmp_path / "b", "suponly", "1_4")
    write_run(tmp_path / "c", "suponly", "1_2", finished=False)
    assert answers(only(tmp_path)) == [
        "u2pl 50.00 mIoU (one seed) with 50 labeled images; "
        "no finished suponly with the same budget and seeds to compare with.",
        "suponly 50.00 mIoU (one seed) with 100 labeled images.",
    ]


def test_nothing_finished(tmp_path):
    write_run(tmp_path / "a", finished=False)
    assert answers(only(tmp_path)) == ["No run is finished yet."]
