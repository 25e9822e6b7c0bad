"""Searches options of a method: jobs/search.py --preset demo --space optim.lr=0.001..0.1 --samples 12 --asha."""

from pipeline import cli
from pipeline.errors import RunError, UserError
from pipeline.methods import OPTIONS


def _flags(parser: cli.Parser) -> None:
    add = parser.add_argument_group("search", "what to try; --out is the search's directory").add_argument
    add("--space", nargs="+", default=[], help="section.key=low..high or section.key=a,b,c")
    add("--samples", type=int, default=16, help="how many to try (default: 16)")
    add("--optuna", action="store_true", help="draw where earlier ones did well, not at random (u2pl-ray[search])")
    add("--asha", action="store_true", help="stop early what is not among the best third")
    add("--at_once", type=int, default=0, help="trials at a time (default: as many as fit the nodes that are up)")


def main(argv: list[str]) -> None:
    """Entry point."""
    config, args = cli.parse_config(argv, __doc__ or "", OPTIONS, _flags)
    from pipeline.sweep.follow import table
    from pipeline.sweep.search import parse_space, prepare, search

    if args.samples < 1 or args.at_once < 0:
        raise UserError("--samples: at least 1; --at_once: not below 0")
    base, space = prepare(config, parse_space(args.space))
    found = search(base, space, args.samples, optuna=args.optuna, asha=args.asha, at_once=args.at_once)
    if not found:
        raise RunError("no trial came to an evaluation; their directories say why")
    print(*table([("sample", "state", "step", "mIoU"), *(row.cells()[:4] for row in found)]), sep="\n")
    if found[0].state != "done":
        raise RunError("no trial came to its end")
    print(f"best: {found[0].trial.name}, {found[0].trial.out}")


if __name__ == "__main__":
    cli.run(main)
