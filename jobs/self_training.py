"""Naive self-training: trains a teacher, labels the pool with it, trains a student on both: --split 1_8 --out RUN."""

from pipeline import cli
from pipeline.methods import OPTIONS


def main(argv: list[str]) -> None:
    """Entry point."""

    def flags(parser: cli.Parser) -> None:
        parser.add_argument("--fresh", action="store_true", help="delete what earlier stages left and start anew")

    config, args = cli.parse_config(argv, __doc__ or "", OPTIONS, flags)
    from pipeline.training.self_training import self_train

    self_train(config, fresh=args.fresh)


if __name__ == "__main__":
    cli.run(main)
