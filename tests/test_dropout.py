"""Our dropout is dropout: which numbers go is left to chance, and what it does to them is not."""

from __future__ import annotations

import pytest
import torch

from rt_neds.model.dropout import Dropout


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_drops_as_many_as_it_says_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.full((999, 1001), 3.0)
    out = Dropout(p)(x)
    share = float((out == 0).float().mean())
    sd = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share - p) < 5 * sd + 2**-16
    torch.testing.assert_close(
        out[out != 0], torch.full_like(out[out != 0], 3 / (1 - p)), rtol=0.01, atol=0
    )


def test_neighbours_that_share_a_random_word_are_drawn_apart():
    torch.manual_seed(0)
    kept_W4 = (Dropout(0.5)(torch.ones(400_000)) != 0).view(-1, 4).float()
    together = torch.corrcoef(torch.cat([kept_W4[:-1], kept_W4[1:]], dim=1).T)
    assert float((together - torch.eye(8)).abs().max()) < 5 / len(kept_W4) ** 0.5


def test_gradients_go_where_numbers_went():
    x = torch.randn(7, 13, requires_grad=True)
    out = Dropout(0.4)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)


@pytest.mark.parametrize("off", [lambda: Dropout(0.4).eval(), lambda: Dropout(0.0)])
def test_nothing_is_dropped_when_it_is_off(off):
    x = torch.randn(5)
    assert off()(x) is x


def test_the_same_seed_drops_the_same():
    x, dropout = torch.ones(1000), Dropout(0.3)
    torch.manual_seed(5)
    first = dropout(x)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x))
