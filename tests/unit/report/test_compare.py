"""Means, gains and gaps, with numbers that can be checked by hand."""

from pathlib import Path

import pytest
import scipy.stats

from pipeline.methods import OPTIONS
from pipeline.report.compare import STUDENT, compare, spread
from pipeline.report.runs import find_runs, read_run
from tests.unit.report.made import compared, only, write_run


def labels(folder: Path) -> list[str]:
    return [row.label for row in only(folder).rows]


def test_spread():
    assert spread([]) is None
    one = spread([0.5])
    assert one is not None
    assert (one.mean, one.sd, one.seeds) == (50.0, None, 1)
    three = spread([0.5, 0.6, 0.7])
    assert three is not None
    assert (three.mean, three.sd, three.seeds) == (pytest.approx(60.0), pytest.approx(10.0), 3)  # n - 1 below


def test_the_margin_is_that_of_students_t():
    values = [0.1, 0.12, 0.09, 0.15, 0.11]
    found = spread(values)
    assert found is not None
    low, high = scipy.stats.t.interval(0.95, 4, loc=found.mean, scale=scipy.stats.sem([100 * each for each in values]))
    assert found.margin == pytest.approx((high - low) / 2, rel=2e-3)
    for seeds, quantile in enumerate(STUDENT, 2):
        assert quantile == pytest.approx(scipy.stats.t.ppf(0.975, seeds - 1), abs=0.006)


def test_means_over_seeds_last_and_best_and_the_gain(tmp_path):
    for seed, scores in enumerate([(0.6, 0.5), (0.6, 0.7)]):
        write_run(tmp_path / f"s{seed}", seed=seed, scores=scores)
    for seed, scores in enumerate([(0.7, 0.66), (0.7, 0.7)]):
        write_run(tmp_path / f"u{seed}", "u2pl", seed=seed, scores=scores)
    found = only(tmp_path)
    base, u2pl = found.rows
    assert (base.label, u2pl.label, found.splits) == ("suponly", "u2pl", ["1_4"])
    last, best = base.last("1_4"), base.best("1_4")
    assert last is not None
    assert best is not None
    assert last == (pytest.approx(60.0), pytest.approx(14.1421356), 2)
    assert best == (pytest.approx(65.0), pytest.approx(7.0710678), 2)
    gain = found.gain(u2pl, "1_4")
    assert gain == (pytest.approx(8.0), pytest.approx(11.3137085), 2)  # 16 and 0, seed by seed
    assert gain is not None
    assert gain.margin == pytest.approx(12.71 * 11.3137085 / 2**0.5)
    assert found.gain(base, "1_4") is None
    assert found.notes() == []
    assert found.missing() == []


def test_splits_stand_by_their_labeled_share(tmp_path):
    for split, about in (("full", {}), ("1_2", {}), ("1_16", {}), ("mine", {"labeled": 20, "unlabeled": 80})):
        write_run(tmp_path / split, split=split, about=about)
    found = only(tmp_path)
    assert found.splits == ["1_16", "mine", "1_2", "full"]
    assert [found.fraction(split) for split in found.splits] == [1 / 16, 0.2, 0.5, 1.0]


def test_a_split_is_a_share_of_all_images_and_not_of_those_with_masks(tmp_path):
    """VOC's classic protocol: its 1_16 are 92 of 10,582 images."""
    write_run(tmp_path / "a", split="1_16", about={"labeled": 92, "unlabeled": 10490})
    write_run(tmp_path / "b", split="full", about={"labeled": 1464, "unlabeled": 9118})
    found = only(tmp_path)
    assert [found.fraction(split) for split in found.splits] == [92 / 10582, 1464 / 10582]


def test_what_no_checkpoint_tells_the_name_of_the_split_does(tmp_path):
    write_run(tmp_path / "a", split="1_8", data={})
    assert only(tmp_path).fraction("1_8") == 1 / 8


def test_pools_that_grew_between_runs_are_noted(tmp_path):
    for seed, generations in enumerate([[1], [2]]):
        pools = {"root": "/no/toy", "unlabeled_pools": ["/no/pool"], "pool_generations": generations}
        write_run(tmp_path / f"{seed}", "u2pl", seed=seed, config={"data": pools})
    (note,) = only(tmp_path).notes()
    assert note.startswith("How much of the unlabeled pools was there (data.pool_generations) differs: (1,)")


def test_a_run_that_ended_early_is_noted(tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "early", "u2pl", ended=60)
    assert only(tmp_path).notes() == [
        f"Ended before optim.steps, as scores rose no more (eval.patience): {tmp_path / 'early'} at step 60"
    ]


def test_networks_to_look_at_are_of_one_seed(tmp_path):
    for name, method, seed in (("a", "suponly", 0), ("b", "suponly", 1), ("c", "u2pl", 1), ("d", "u2pl", 2)):
        write_run(tmp_path / name, method, seed=seed)
    assert [run.config.seed for _, run in only(tmp_path).shown()] == [1, 1]


def test_unfinished_and_missing_runs_are_named_and_do_not_count(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"s{seed}", seed=seed)
    write_run(tmp_path / "u0", "u2pl", seed=0, scores=(0.6,))
    write_run(tmp_path / "u2", "u2pl", seed=2, scores=(0.9,), finished=False)
    found = only(tmp_path)
    u2pl = found.rows[1]
    assert u2pl.last("1_4") == (60.0, None, 1)
    ((row, split, unfinished, absent),) = found.missing()
    assert (row, split, [run.config.seed for run in unfinished], absent) == (u2pl, "1_4", [2], [1])


def test_a_gain_is_over_the_seeds_that_both_have(tmp_path):
    for seed, score in enumerate((0.5, 0.7)):
        write_run(tmp_path / f"s{seed}", seed=seed, scores=(score,))
    write_run(tmp_path / "u1", "u2pl", seed=1, scores=(0.75,))
    write_run(tmp_path / "c2", "cps", seed=2, scores=(0.9,))
    found = only(tmp_path)
    assert {row.label: found.gain(row, "1_4") for row in found.rows} == {
        "suponly": None, "cps": None, "u2pl": (pytest.approx(5.0), None, 1),
    }  # fmt: skip


def test_gains_over_another_method_or_over_one_row_of_it(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"c{seed}", "cps", seed=seed, scores=(0.5,))
        write_run(tmp_path / f"u{seed}", "u2pl", seed=seed, scores=(0.6,))
        write_run(tmp_path / f"b{seed}", "u2pl", seed=seed, scores=(0.58,), config={"u2pl": {"loss": "binary"}})
    runs = [read_run(uri, OPTIONS) for uri in find_runs([str(tmp_path)])]

    def gains(over: str) -> dict[str, float | None]:
        (found,) = compare(runs, OPTIONS, over)
        return {row.label: gain and round(gain.mean, 9) for row in found.rows for gain in [found.gain(row, "1_4")]}

    assert gains("cps") == {"cps": None, "u2pl": 10, "u2pl (loss=binary)": 8}
    assert gains("u2pl (loss=binary)") == {"cps": -8, "u2pl": 2, "u2pl (loss=binary)": None}


class TestVariants:
    def test_the_default_goes_without_saying(self, tmp_path):
        write_run(tmp_path / "a", "u2pl")
        for seed in (0, 1):
            write_run(tmp_path / f"b{seed}", "u2pl", seed=seed, config={"u2pl": {"loss": "binary"}})
        assert labels(tmp_path) == ["u2pl", "u2pl (loss=binary)"]

    def test_without_the_default_the_commonest(self, tmp_path):
        for seed, steps in enumerate((50, 50, 60)):
            write_run(tmp_path / f"{seed}", seed=seed, config={"optim": {"steps": steps}})
        assert labels(tmp_path) == ["suponly", "suponly (optim.steps=60)"]

    def test_a_section_of_the_config_is_no_option_of_the_same_name(self, tmp_path):
        """U2PL has an option `loss`, and the config a section."""
        write_run(tmp_path / "a", "u2pl")
        write_run(tmp_path / "b", "u2pl", config={"loss": {"supervised": "ohem"}})
        assert labels(tmp_path) == ["u2pl", "u2pl (loss.supervised=ohem)"]

    def test_options_of_other_methods_do_not_count(self, tmp_path):
        write_run(tmp_path / "a", "cps", seed=0)
        write_run(tmp_path / "b", "cps", seed=1, config={"u2pl": {"loss": "binary"}})
        assert labels(tmp_path) == ["cps"]

    def test_but_those_of_the_methods_that_a_method_joins(self, tmp_path):
        write_run(tmp_path / "a", "u2pl_ael")
        write_run(tmp_path / "b", "u2pl_ael", config={"u2pl": {"lambda_c": 0.5}})
        assert labels(tmp_path) == ["u2pl_ael", "u2pl_ael (u2pl.lambda_c=0.5)"]

    def test_place_and_machines_do_not_count(self, tmp_path):
        write_run(tmp_path / "a", seed=0)
        write_run(
            tmp_path / "b", seed=1, config={"scaling": {"workers": 4}, "out": "/else", "data": {"root": "s3://b/toy"}}
        )
        assert labels(tmp_path) == ["suponly"]

    def test_long_values_are_cut(self, tmp_path):
        write_run(tmp_path / "a", seed=0)
        write_run(tmp_path / "b", seed=1)
        write_run(tmp_path / "c", config={"model": {"weights": "s3://bucket/" + 60 * "x"}})
        assert labels(tmp_path)[1] == f"suponly (model.weights=s3://bucket/{28 * 'x'}...)"


class TestNothingIsMixedSilently:
    def test_datasets_and_protocols_get_tables_of_their_own(self, tmp_path):
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", about={"protocol": "classic"})
        write_run(tmp_path / "c", data={"index": "other", "split": "x", "classes": ["a"]})
        found = compared(tmp_path)
        assert [(each.dataset, each.protocol, len(each.runs)) for each in found] == [
            ("toy", "random", 1), ("toy", "classic", 1), ("toy", "random", 1),
        ]  # fmt: skip

    def test_a_gain_needs_the_same_budget(self, tmp_path):
        write_run(tmp_path / "s", scores=(0.5,))
        write_run(tmp_path / "u", "u2pl", scores=(0.6,))
        write_run(tmp_path / "v", "u2pl", scores=(0.7,), config={"optim": {"steps": 200}})
        found = only(tmp_path)
        assert [row.label for row in found.rows] == ["suponly", "u2pl", "u2pl (optim.steps=200)"]
        assert [found.gain(row, "1_4") for row in found.rows] == [None, (pytest.approx(10.0), None, 1), None]
        assert found.notes() == ["optim.steps differs: 100 (suponly, u2pl); 200 (u2pl (optim.steps=200))"]

    def test_of_several_baselines_the_nearest_counts(self, tmp_path):
        for lr, score in ((0.001, 0.70), (0.01, 0.75)):
            write_run(tmp_path / f"s{lr}", scores=(score,), config={"optim": {"steps": 100, "lr": lr}})
            write_run(tmp_path / f"u{lr}", "u2pl", scores=(0.76,), config={"optim": {"steps": 100, "lr": lr}})
        found = only(tmp_path)
        gains = {row.options["optim.lr"]: found.gain(row, "1_4") for row in found.rows if row.method == "u2pl"}
        assert gains == {0.001: (pytest.approx(6.0), None, 1), 0.01: (pytest.approx(1.0), None, 1)}

    def test_other_lists_are_noted(self, tmp_path):
        one = write_run(tmp_path / "a", seed=0)
        two = write_run(tmp_path / "b", seed=1, data={"index": "abc" * 20, "split": "else", "classes": ["a"]})
        assert only(tmp_path).notes() == [f"The list of split 1_4 differs: list-1_4 ({one}); else ({two})"]

    def test_of_two_equal_runs_the_one_that_got_further_counts(self, tmp_path):
        write_run(tmp_path / "a", scores=(0.5, 0.6), finished=False)
        write_run(tmp_path / "b", scores=(0.7,))
        found = only(tmp_path)
        assert [run.uri for run in found.runs] == [str(tmp_path / "b")]
        assert found.notes() == [
            f"Left out, as others have the same method, settings, split and seed: {tmp_path / 'a'}"
        ]


def test_who_is_looked_at(tmp_path):
    write_run(tmp_path / "a", "cps", scores=(0.9,))
    assert [run.uri for _, run in only(tmp_path).shown()] == [str(tmp_path / "a")]
    write_run(tmp_path / "b", "suponly")
    assert [row.label for row, _ in only(tmp_path).shown()] == ["suponly", "cps"]
    write_run(tmp_path / "c", "cct", scores=(0.95,))
    assert [row.label for row, _ in only(tmp_path).shown()] == ["suponly", "cct"]
    write_run(tmp_path / "d", "u2pl", scores=(0.1,))
    assert [row.label for row, _ in only(tmp_path).shown()] == ["suponly", "u2pl"]
    assert only(write_run(tmp_path / "e", finished=False)).shown() == []
