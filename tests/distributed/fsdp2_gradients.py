"""Under `torchrun`: a model whose parameters FSDP2 spreads over the processes has the loss and gradients of a whole one."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from conftest import IMAGE_SIZE, make_quantized  # noqa: E402  found by the path above


dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
rank = dist.get_rank()
generator = torch.Generator().manual_seed(0)
images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
labels = torch.tensor([0, 1, 2, 0])
mine = slice(2 * rank, 2 * rank + 2)
for stage in ("pretrain", "search", "finetune"):
    whole = make_quantized("vit", stage).train()
    sharded = make_quantized("vit", stage).train()
    sharded.load_state_dict(whole.state_dict())
    for block in sharded.backbone.vit.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)

    expected = whole(pixel_values=images, labels=labels).loss
    expected.backward()
    loss = sharded(pixel_values=images[mine], labels=labels[mine]).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-5, atol=1e-5)
    for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        # A shift of all keys changes no softmax: the gradient of their bias is rounding noise around zero.
        if not name.endswith("k_proj.bias"):
            difference = (parameter.grad.full_tensor() - other.grad).norm()
            assert difference <= 1e-3 * other.grad.norm(), (stage, name, difference.item(), other.grad.norm().item())
    if rank == 0:
        print(f"{stage}: same", flush=True)
# None leaves before the other: once one ended with "terminate called without an active exception" when all was done.
dist.barrier()
dist.destroy_process_group()
