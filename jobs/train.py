"""Trains one method on one split: python jobs/train.py --split 1_2."""

from pipeline import cli
from pipeline.methods import OPTIONS


def main(argv: list[str]) -> None:
    """Entry point."""

    def flags(parser: cli.Parser) -> None:
        parser.add_argument("--fresh", action="store_true", help="delete the run directory and start anew")

    config, args = cli.parse_config(argv, __doc__ or "", OPTIONS, flags)
    from pipeline.training.launch import launch

    launch(config, fresh=args.fresh)


if __name__ == "__main__":
    cli.run(main)
