"""Training under torchrun in which rank 1 can't read its data in the second epoch; started by test_distributed.py.

torchrun --nproc-per-node 2 -m helpers.dying_rank FOLDER
"""

import sys

from torch.utils.data import DataLoader, Dataset

from gkt_fast.distributed import rank, torchrun_process_group
from helpers.distributed_checks import JOINED_BATCH, data, make_trainer


class Failing(Dataset):
    """Good for one epoch."""

    reads = 0

    def __len__(self) -> int:
        return JOINED_BATCH

    def __getitem__(self, index):
        self.reads += 1
        if rank() == 1 and self.reads > len(self):
            raise OSError("the disk of rank 1 is on fire")
        return data()[index]


with torchrun_process_group("cpu", timeout=120):
    make_trainer().fit(DataLoader(Failing(), 4), epochs=3, output_dir=sys.argv[1], progress=False)
