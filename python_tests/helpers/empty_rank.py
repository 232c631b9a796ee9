"""Training under torchrun in which rank 1 gets an empty batch; started by test_distributed.py.

torchrun --nproc-per-node 2 -m helpers.empty_rank
"""

from gkt_fast.distributed import rank, torchrun_process_group
from helpers.distributed_checks import data, make_trainer

images, targets = data()[:4]
with torchrun_process_group("cpu", timeout=120):
    rows = 0 if rank() == 1 else 4
    make_trainer().fit([(images[:rows], targets[:rows])], epochs=1, progress=False)
