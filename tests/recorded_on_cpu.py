"""Graphs without a GPU: a `GraphMemory` whose recordings compute their values anew, into the same tensors, as CUDA graphs do."""

import torch
from l2r2_kernels import GraphMemory


class RecordedOnCPU(GraphMemory):
    """Counts what is recorded and replayed."""

    def __init__(self):
        super().__init__()
        self.recorded = self.replayed = 0

    def holds(self, x):
        return x.device.type == "cpu"

    def warm_up(self, call):
        call()

    def record(self, call):
        places = [None if value is None else value.detach() for value in call()]
        self.recorded += 1
        gradients = torch.is_grad_enabled()

        def replay():
            self.replayed += 1
            with torch.set_grad_enabled(gradients):
                values = call()
            for place, value in zip(places, values, strict=True):
                if place is not None:
                    place.copy_(value.detach())

        return places, replay
