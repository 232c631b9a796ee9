"""The table of networks whose blocks are found without configuration: stages, modes, and what a step costs.

    python bench/model_table.py --update

writes it into docs/guide/models.md. Costs are expectations in plain steps with the default configuration (three
subnets), counted in FLOPs of the networks as their libraries give them.
python_tests/network/test_model_coverage.py holds every row against the code.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gkt_fast.instruments.model_table import COMMAND, DOCUMENT, row, table
from gkt_fast.instruments.tables import replace_marked
from gkt_fast.instruments.zoo import ZOO

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help=f"write the table into {DOCUMENT}")
    args = parser.parse_args()
    text = table([row(zoo_model) for zoo_model in ZOO])
    print(text, end="")
    if args.update:
        path = ROOT / DOCUMENT
        path.write_text(replace_marked(path.read_text(), COMMAND, text))


if __name__ == "__main__":
    main()
