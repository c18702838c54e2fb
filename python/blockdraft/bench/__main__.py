"""`python -m blockdraft.bench`, the same as `blockdraft bench`; with `--render FILE` the table of a saved run."""

import argparse
import sys

from blockdraft import bench
from blockdraft.errors import BlockdraftError

parser = argparse.ArgumentParser(prog="python -m blockdraft.bench", description="Times operators, a layer or a model.")
bench.add_arguments(parser)
try:
    sys.exit(bench.main(parser.parse_args()))
except BlockdraftError as error:
    print(f"blockdraft bench: {error}", file=sys.stderr)
    sys.exit(2)
