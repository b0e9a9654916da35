"""Two processes with half a batch each do what one process does with the whole batch."""

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import FORKS
from torch.nn.parallel import DistributedDataParallel

from loupe_core.loss import LoupeLoss
from loupe_core.model import LoupeModel

STEPS, WHOLE = 2, slice(None)


def train(wrap=lambda model: model, share=WHOLE) -> dict:
    """Losses and gradients of STEPS steps of SGD on this share of each batch of 4, in double precision."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), drop_path_rate=0)  # nothing by chance
    backbone = timm.create_model("swin_micro", **options)
    model = LoupeModel(backbone, num_classes=3, site=["stage2", "stage3.inside"], form="mix").double()
    wrapped, loss = wrap(model), LoupeLoss(lam=0.7, warmup_epochs=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    terms = []
    for step in range(STEPS):
        images, labels = torch.randn(4, 3, 112, 112, dtype=torch.double), torch.randint(3, (4,))
        logits, masks = wrapped(images[share], return_mask=True)
        found = loss(logits, labels[share], masks, epoch=1 + step)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        terms.append(torch.stack(found).detach())
    return dict(terms=torch.stack(terms), gradients={name: p.grad for name, p in model.named_parameters()})


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(train(DistributedDataParallel, slice(2 * rank, 2 * rank + 2)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path):
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method=FORKS.get_start_method())
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    whole = train()
    torch.testing.assert_close((one["terms"] + two["terms"]) / 2, whole["terms"], rtol=1e-10, atol=1e-12)
    assert not torch.equal(one["terms"], two["terms"])  # they did see different images
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(one["gradients"][name], gradient, rtol=1e-8, atol=1e-12, msg=name)
        assert torch.equal(one["gradients"][name], two["gradients"][name]), name
