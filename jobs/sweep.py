"""Runs method x split x seed: jobs/sweep.py --preset demo --methods suponly,u2pl --splits 1_8,1_4 --seeds 2."""

from pipeline import cli
from pipeline.errors import RunError, UserError
from pipeline.methods import OPTIONS

IMAGES = 5
"""Validation images in the report."""


def _flags(parser: cli.Parser) -> None:
    add = parser.add_argument_group("sweep", "which runs; --out is the sweep's directory").add_argument
    add("--methods", default="suponly,u2pl", help="names, separated by commas (default: suponly,u2pl)")
    add("--splits", default="1_16,1_8,1_4,1_2", help="names, separated by commas (default: 1_16,1_8,1_4,1_2)")
    add("--seeds", type=int, default=1, help="how many, counted up from --seed (default: 1)")
    add("--grid", nargs="+", default=[], help="section.key=a,b,c, or ablation_reliability, ablation_loss")
    add("--at_once", type=int, default=0, help="trials at a time (default: as many as fit the nodes that are up)")
    add("--plan", action="store_true", help="print trials, steps, hours and money, and start nothing")
    add("--step_seconds", nargs="+", default=[], help="for --plan: METHOD=SECONDS, or SECONDS for all other methods")
    add("--node", nargs=3, metavar=("COUNT", "WORKERS", "PRICE"), default=["1", "1", "0"], help="for --plan")


def main(argv: list[str]) -> None:
    """Entry point."""
    config, args = cli.parse_config(argv, __doc__ or "", OPTIONS, _flags)
    from pipeline.inference.comparison import write_report
    from pipeline.report import results
    from pipeline.report.html import text_table
    from pipeline.sweep.run import sweep
    from pipeline.sweep.trials import TRIALS, make_trials, parse_grid

    if args.seeds < 1 or args.at_once < 0:
        raise UserError("--seeds: at least 1; --at_once: not below 0")
    methods, splits = (list(filter(None, text.split(","))) for text in (args.methods, args.splits))
    trials = make_trials(config, methods, splits, args.seeds, parse_grid(args.grid))
    if args.plan:
        from pipeline.sweep.costs import parse_node, parse_step_seconds, plan

        print("\n".join(plan(trials, parse_step_seconds(args.step_seconds), parse_node(args.node))))
        return
    failed = sweep(trials, args.at_once)
    page = trials[0].out.rpartition(f"/{TRIALS}/")[0] + "/report.html"
    for each in write_report([trial.out for trial in trials if trial.begun()], page, IMAGES, failed):
        print(*map(text_table, results.tables(each)), sep="\n\n", end="\n\n")
    print(f"report {page}")
    if failed:
        raise RunError(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again")


if __name__ == "__main__":
    cli.run(main)
