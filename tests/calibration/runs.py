"""Calibrations to compare with: by brute force, shuffled, interrupted."""

import json

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests import zoo

LOADER = zoo.labelled(3, 4)


def together(loader=LOADER):
    return torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader])


def brute_force(plan, metric, loader=LOADER):
    """The metric with each site replaced in a graph of its own, on all samples at once; first that of no site."""
    x, labels = together(loader)
    out = []
    with torch.no_grad():
        base = plan.apply(0)(x)
        for chosen in ([], *([s.name] for s in plan.sites)):
            logits = plan.apply(sites=chosen)(x) if chosen else base
            if metric == "accuracy":
                out.append(float((logits.argmax(1) == labels).double().mean()))
            elif metric == "loss":
                out.append(float(F.cross_entropy(logits.double(), labels)))
            else:
                p, q = (F.log_softmax(t.double(), 1) for t in (base, logits))
                out.append(float((p.exp() * (p - q)).sum(1).mean()))
    return out


def shuffled():
    return DataLoader(TensorDataset(*together()), batch_size=4, shuffle=True)


def as_json(plan):
    return json.dumps(plan.to_dict(), sort_keys=True)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def interrupted(loader, after):
    for i, batch in enumerate(loader):
        if i == after:
            raise Killed
        yield batch
