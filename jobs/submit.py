"""Sends a job to a cluster and follows it: python jobs/submit.py [--address URL] -- jobs/train.py --split 1_2."""

import sys
from pathlib import Path

from pipeline import cli
from pipeline.errors import UserError
from pipeline.submit import LOCAL, submit


def main(argv: list[str]) -> None:
    """Entry point; exits with the job's own code."""
    own, command = argv, []
    if "--" in argv:
        place = argv.index("--")
        own, command = argv[:place], argv[place + 1 :]
    parser = cli.Parser(description=__doc__, usage="%(prog)s [--address URL] -- jobs/train.py [FLAGS]")
    parser.add_argument("--address", metavar="URL", help=f"job server (default: RAY_API_SERVER_ADDRESS, or {LOCAL})")
    args = parser.parse(own)
    if not command:
        raise UserError("no job given after --, such as: python jobs/submit.py -- jobs/train.py --split 1_2")
    sys.exit(submit(command, args.address, Path(__file__).parents[1]))


if __name__ == "__main__":
    cli.run(main)
