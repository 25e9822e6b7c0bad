"""From images to compared runs: what prepares data, and trains."""

import argparse
import inspect
import shlex
from collections.abc import Callable, Iterable

from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import Config
from pipeline.errors import RunError, UserError

REPORT_IMAGES = 5
"""Validation images in a report."""


def prepare(argv: list[str]) -> None:
    """Makes a prepared dataset or a pool: u2pl prepare --source voc --root VOC2012 --out s3://bucket/voc.

    With --check s3://bucket/voc it looks through a finished dataset instead, and reports what it finds.
    """
    from pipeline import storage
    from pipeline.datasets.pools.make import make_pool
    from pipeline.datasets.pools.sources import POOL_SOURCES
    from pipeline.datasets.prepared.prepare import prepare as prepare_samples
    from pipeline.datasets.prepared.prepare import summary, warnings
    from pipeline.datasets.raw.bands import parse_bands
    from pipeline.datasets.raw.flags import POOL_FLAGS, parse, read_raw
    from pipeline.datasets.raw.photos import PhotoRules
    from pipeline.datasets.shapes import LOOKS, prepare_shapes

    args = parse(argv, inspect.getdoc(prepare))
    if args.check:
        _check(args.check, args.page)
        return
    if args.source in POOL_SOURCES:
        flags = {key: vars(args)[key] for key in POOL_FLAGS}
        pool = make_pool(args.source, args.root, args.out, name=args.name or args.source, **flags)
        print(f"{args.out}: {pool.summary}")
        return
    if args.source in LOOKS:
        info, passed = prepare_shapes(args.out, args.seed, args.source, overwrite=args.overwrite), {}
    else:
        samples, spec, passed = read_raw(args)
        info = prepare_samples(
            samples,
            args.out,
            name=args.name or args.source,
            spec=spec,
            seed=args.seed,
            release=(args.splits, args.protocol) if args.splits else None,
            rules=PhotoRules(args.exif, args.high_byte, parse_bands(args.bands, args.range) if args.bands else None),
            inputs=[storage.absolute(place) for place in (args.root, args.splits, args.sbd) if place],
            **{key: vars(args)[key] for key in ("overwrite", "skip_bad", "workers")},
        )
    for line in warnings(info):
        print(line)
    print(f"{args.out}: {summary(info, passed)}")


def _check(uri: str, page: str) -> None:
    """Prints what is in a dataset, writes it as a page with pictures, and fails if something is broken."""
    from pipeline import storage
    from pipeline.datasets.check import check
    from pipeline.datasets.prepared.dataset import open_dataset
    from pipeline.report.dataset_page import as_page, as_text

    found = check(open_dataset(uri))
    print(as_text(found))
    storage.write_bytes(page, as_page(found).encode())
    print(f"page {page}")
    if found.problems:
        raise RunError(f"{uri}: {len(found.problems)} problems, the first: {found.problems[0]}")


def _config(
    argv: list[str], command: Callable[[list[str]], None], flags: Callable[[cli.Parser], None]
) -> tuple[Config, argparse.Namespace]:
    return cli.parse_config(argv, inspect.getdoc(command) or "", OPTIONS, flags)


def train(argv: list[str]) -> None:
    """Trains one method on one split: u2pl train --split 1_2."""

    def flags(parser: cli.Parser) -> None:
        begin = parser.add_mutually_exclusive_group()
        begin.add_argument("--fresh", action="store_true", help="delete the run directory and start anew")
        help_text = "go on from this checkpoint, without those after it (default: the newest)"
        begin.add_argument("--resume_from", metavar="step_N", help=help_text)
        help_text = "check config, data, run directory and cluster, print what would run, and start nothing"
        begin.add_argument("--dry_run", action="store_true", help=help_text)

    config, args = _config(argv, train, flags)
    from pipeline.training.launch import launch, plan
    from pipeline.training.preflight import resolve_paths

    config = resolve_paths(config)
    if args.dry_run:
        plan(config)
        return
    launch(config, fresh=args.fresh, resume_from=args.resume_from)
    run = shlex.quote(str(config.out))
    print(f"next: u2pl evaluate {run}\n      u2pl predict {run} --images PHOTOS --out MASKS\n      u2pl report {run}")


def self_training(argv: list[str]) -> None:
    """Trains a teacher, labels the unlabeled images with it, trains a student: u2pl self_training --split 1_8."""

    def flags(parser: cli.Parser) -> None:
        parser.add_argument("--fresh", action="store_true", help="delete what earlier stages left and start anew")

    values, args = cli.parse_values(
        argv, inspect.getdoc(self_training) or "", OPTIONS, flags, lambda _: ["self_training"]
    )
    from pipeline.training.recipe import self_train

    self_train(cli.resolve(values, OPTIONS), fresh=args.fresh)


def sweep(argv: list[str]) -> None:
    """Trains method x split x seed: u2pl sweep --methods suponly,u2pl --splits 1_8,1_4 --seeds 2."""

    def flags(parser: cli.Parser) -> None:
        add = parser.add_argument_group("sweep", "which runs; --out is the sweep's directory").add_argument
        add("--methods", default="suponly,u2pl", help="names, separated by commas (default: suponly,u2pl)")
        add("--splits", default="1_16,1_8,1_4,1_2", help="names, separated by commas (default: 1_16,1_8,1_4,1_2)")
        add("--seeds", type=int, default=1, help="how many, counted up from --seed (default: 1)")
        add("--grid", nargs="+", default=[], help="section.key=a,b,c, or ablation_reliability, ablation_loss")
        add("--at_once", type=int, default=0, help="trials at a time (default: as many as fit the nodes that are up)")
        add("--plan", action="store_true", help="print trials, steps, hours and money, and start nothing")
        add("--step_seconds", nargs="+", default=[], help="for --plan: METHOD=SECONDS, or SECONDS for all others")
        add("--node", nargs=3, metavar=("COUNT", "WORKERS", "PRICE"), default=["1", "1", "0"], help="for --plan")

    def names(text: str) -> list[str]:
        return list(filter(None, text.split(",")))

    values, args = cli.parse_values(argv, inspect.getdoc(sweep) or "", OPTIONS, flags, lambda args: names(args.methods))
    from pipeline.report import results
    from pipeline.report.answer import answers
    from pipeline.report.render import text_table
    from pipeline.report.writer import write_report
    from pipeline.sweep.run import sweep as run_trials
    from pipeline.sweep.trials import TRIALS, make_trials, parse_grid

    if args.seeds < 1 or args.at_once < 0:
        raise UserError("--seeds: at least 1; --at_once: not below 0")
    trials = make_trials(values, names(args.methods), names(args.splits), args.seeds, parse_grid(args.grid))
    if args.plan:
        from pipeline.sweep.costs import parse_node, parse_step_seconds, plan

        print("\n".join(plan(trials, parse_step_seconds(args.step_seconds), parse_node(args.node))))
        return
    failed = run_trials(trials, args.at_once)
    page = trials[0].out.rpartition(f"/{TRIALS}/")[0] + "/report.html"
    for each in write_report([trial.out for trial in trials if trial.begun()], page, REPORT_IMAGES, failed):
        _show(answers(each), map(text_table, results.tables(each)))
    print(f"report {page}")
    if failed:
        raise RunError(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again")


def _show(sentences: Iterable[str], tables: Iterable[str]) -> None:
    """Prints sentences, within the width of a terminal, and tables as they are."""
    from pipeline.cluster.terminal import say

    say("\n\n".join(sentences) + "\n")
    print(*tables, sep="\n\n", end="\n\n")


def search(argv: list[str]) -> None:
    """Searches good options of one method: u2pl search --space optim.lr=0.001..0.1 --samples 12 --asha."""

    def flags(parser: cli.Parser) -> None:
        add = parser.add_argument_group("search", "what to try; --out is the search's directory").add_argument
        add("--space", nargs="+", default=[], help="section.key=low..high or section.key=a,b,c")
        add("--samples", type=int, default=16, help="how many to try (default: 16)")
        add("--optuna", action="store_true", help="draw where earlier ones did well, not at random (u2pl-ray[search])")
        add("--asha", action="store_true", help="stop early what is not among the best third")
        add("--at_once", type=int, default=0, help="trials at a time (default: as many as fit the nodes that are up)")

    config, args = _config(argv, search, flags)
    from pipeline.sweep.search import parse_space
    from pipeline.sweep.search import prepare as prepare_search
    from pipeline.sweep.search import search as run_search
    from pipeline.sweep.table import table

    if args.samples < 1 or args.at_once < 0:
        raise UserError("--samples: at least 1; --at_once: not below 0")
    base, space = prepare_search(config, parse_space(args.space))
    found = run_search(base, space, args.samples, optuna=args.optuna, asha=args.asha, at_once=args.at_once)
    if not found:
        raise RunError("no trial came to an evaluation; their directories say why")
    print(*table([("sample", "state", "step", "mIoU"), *(row.cells()[:4] for row in found)]), sep="\n")
    if found[0].state != "done":
        raise RunError("no trial came to its end")
    print(f"best: {found[0].trial.name}, {found[0].trial.out}")


def report(argv: list[str]) -> None:
    """Compares runs on a page, as Markdown and as CSV: u2pl report RUNS... --out report.html.

    RUNS are run directories, or folders or URIs that hold some, finished or not.
    """
    parser = cli.Parser(description=inspect.getdoc(report))
    parser.add_argument("runs", nargs="+", help="run directories, or folders or URIs (s3://bucket/prefix) of them")
    parser.add_argument("--out", default="report.html", help="page to write (default: report.html)")
    help_text = f"validation images to show; 0: none (default: {REPORT_IMAGES})"
    parser.add_argument("--images", type=int, default=REPORT_IMAGES, help=help_text)
    parser.add_argument("--over", default="suponly", help="method, or row, that gains are over (default: suponly)")
    parser.add_argument("--figures", metavar="DIR", help="write the charts there, too, each as PDF, SVG and PNG")
    args = parser.parse(argv)
    from pipeline.report import results
    from pipeline.report.answer import answers
    from pipeline.report.render import text_table
    from pipeline.report.writer import write_report

    for each in write_report(args.runs, args.out, args.images, figures=args.figures, over=args.over):
        _show([results.headline(each), *answers(each), *each.notes()], map(text_table, results.tables(each)))
    print(f"report {args.out}")
