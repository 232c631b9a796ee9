"""Where gkt_fast 0.1 kept what ends up in pickles: its modules can be imported by those names as well."""

from __future__ import annotations

import sys

from .batch_norm import fusion
from .deployment import evaluation, subnet_table
from .network import interception
from .subnets import plan, subnet
from .training import schedules

sys.modules |= {
    "gkt_fast.evaluation": evaluation,
    "gkt_fast.execution.interception": interception,
    "gkt_fast.fusion": fusion,
    "gkt_fast.plan": plan,
    "gkt_fast.schedules": schedules,
    "gkt_fast.subnet": subnet,
    "gkt_fast.subnet_table": subnet_table,
}
