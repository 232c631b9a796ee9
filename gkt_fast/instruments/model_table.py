"""Rows about networks whose blocks are found without configuration: stages, modes, and what a step costs."""

from __future__ import annotations

import torch
from torch import nn

from gkt_fast import GKT, GKTConfig, Stage

from .zoo import ZooModel

DOCUMENT = "docs/guide/models.md"
"""Where the table stands."""
COMMAND = "python bench/model_table.py --update"
COLUMNS = ("model", "blocks found in", "depths", "of these, kept always", "modes", "one by one", "shared")


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
