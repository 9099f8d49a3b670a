"""Models that select by their data: sizes that the trace does not know, attention and dropout that draw nothing."""

import torch
import torch.nn.functional as F
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.paper_block import paper_block
from vmeanba_fx.capturing.capture import capture_info


class Matched(nn.Module):
    """Adds to each token its nearest half: a mask picks as many tokens of each image, which export cannot know."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        batch, _, _, dim = x.shape
        tokens = x.flatten(1, 2)
        count = tokens.shape[1] // 2
        ranks = tokens.norm(dim=-1).argsort(1).argsort(1)
        chosen = tokens.masked_select((ranks < count)[..., None]).reshape(batch, count, dim)
        return self.mixer(x) + chosen.mean(1)[:, None, None]


class Routed(nn.Module):
    """Runs its mixer on some of the images."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        taken = x.mean((1, 2, 3)) > 0
        return torch.zeros_like(x).index_put((taken,), self.mixer(x[taken]))


class Attends(nn.Module):
    def forward(self, x):
        tokens = x.flatten(1, 2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].view_as(x)


def with_first(op):
    """Two blocks, the first of which runs ``op``."""
    model = zoo.live()
    model.blocks[0].op = op(model.blocks[0].op)
    return model


def test_counts_that_the_trace_does_not_know():
    model, x = with_first(Matched), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    assert capture_info(gm).batch_dynamic
    sites = vmeanba_fx.find_sites(gm)
    assert [site.name for site in sites] == ["blocks.0.op.mixer", "blocks.1.op"]
    exact, lossy = (vmeanba_fx.transform(gm, zoo.labelled(), k=k) for k in (0, 2))
    with torch.no_grad():
        outputs = {batch: model(zoo.images(batch)) for batch in (1, 2, 5)}
        for scanner in zoo.scanners(model):
            scanner.call = lambda u, delta, A, B, C, D, bias: paper_block(u, delta, A, B, C, D, None, bias, True)
        for batch, expected in outputs.items():
            assert relative_error(exact(zoo.images(batch)), expected) <= 1e-5
            assert relative_error(lossy(zoo.images(batch)), model(zoo.images(batch))) <= 1e-5


def test_a_scan_of_as_many_images_as_the_data_say_is_refused():
    model, x = with_first(Routed), zoo.images(5)
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    assert [site.name for site in sites] == ["blocks.1.op"]
    assert sites.refused == [("blocks.0.op.mixer", "its batch depends on the data")]
    exact = vmeanba_fx.transform(gm, zoo.labelled(), k=0)
    with torch.no_grad():
        assert relative_error(exact(x), model(x)) <= 1e-5


def test_attention_without_dropout_draws_nothing():
    gm = vmeanba_fx.capture(with_first(lambda op: nn.Sequential(op, Attends())), zoo.images(3))
    assert not capture_info(gm).notes
