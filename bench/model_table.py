"""The table of networks whose blocks are found without configuration: stages, modes, and what a step costs.

    python bench/model_table.py --update

writes it into docs/models.md, and its short form into README.md. Costs are expectations in plain steps with the default
configuration (three subnets), counted in FLOPs of the networks as their libraries give them.
python_tests/test_model_coverage.py holds every row against the code.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from documents import replace_marked
from torch import nn
from zoo import ZOO, ZooModel

from gkt_fast import GKT, GKTConfig, Stage

ROOT = Path(__file__).parents[1]
FILES = {ROOT / "docs" / "models.md": False, ROOT / "README.md": True}
"""Where tables stand, and whether they hold the headlines only."""
COMMAND = "python bench/model_table.py --update"
COLUMNS = ("model", "blocks found in", "depths", "of these, kept always", "modes", "one by one", "shared")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--update", action="store_true", help="write the tables into docs/models.md and README.md"
    )
    args = parser.parse_args()
    rows = {zoo_model: row(zoo_model) for zoo_model in ZOO}
    for path, headlines_only in FILES.items():
        text = table([cells for model, cells in rows.items() if model.headline or not headlines_only])
        if args.update:
            path.write_text(replace_marked(path.read_text(), COMMAND, text))
        elif not headlines_only:
            print(text, end="")


def row(zoo_model: ZooModel) -> str:
    """A line of the table."""
    model = on_meta(zoo_model)
    gkt = GKT(model, GKTConfig(fuse_blocks=False))
    gkt.layers(torch.empty(1, 3, zoo_model.pixels, zoo_model.pixels, device="meta"))
    stacked = "\nexecution: stacked (" in gkt.explain()
    cells = (
        f"{zoo_model.library} `{zoo_model.name}`",
        containers(gkt.stages),
        "-".join(str(stage.depth) for stage in gkt.stages),
        "-".join(str(stage.depth - sum(stage.droppable)) for stage in gkt.stages),
        "all" if stacked else "all but `stacked`",
        f"{gkt.expected_cost(one_by_one=True):.2f}",
        f"{gkt.expected_cost():.2f}",
    )
    return f"| {' | '.join(cells)} |"


def on_meta(zoo_model: ZooModel) -> nn.Module:
    """The network without weights: only its shapes count."""
    try:
        with torch.device("meta"):
            return zoo_model.build()
    except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
        return zoo_model.build().to("meta")


def containers(stages: list[Stage]) -> str:
    """The modules that hold the stages, the first and the last of them."""
    parents = list(dict.fromkeys(stage.blocks[0].rpartition(".")[0] for stage in stages))
    return " ... ".join(f"`{path}`" for path in dict.fromkeys((parents[0], parents[-1])))


def table(rows: list[str]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
