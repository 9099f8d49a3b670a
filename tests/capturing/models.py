"""Models that a capture has to be careful with."""

import torch
import torch.nn.functional as F

from tests import zoo


class StaticBatch(zoo.TinyNet):
    """Reads its batch size as a number, as MambaVision does."""

    def forward(self, x):
        return super().forward(x).reshape(int(x.shape[0]), -1)


class StaticSize(zoo.TinyNet):
    """Checks its image size, as Vim does."""

    def forward(self, x):
        if x.shape[2] != zoo.HEIGHT or x.shape[3] != zoo.WIDTH:
            raise ValueError("wrong image size")
        return super().forward(x)


class InPlaceBlock(zoo.Block):
    def forward(self, x):
        x = x.clone()
        x += self.op(self.norm(x))
        return F.relu_(x)


class AutocastBlock(zoo.Block):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.op(self.norm(x))
        return x + y.float()
