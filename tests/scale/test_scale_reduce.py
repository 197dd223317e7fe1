"""Sums over two real processes, one of them without a token."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expertly.moe.policy import Policy, decide
from expertly.moe.routing import Tokens
from expertly.scale.reduce import sum_over_ranks
from expertly.watch.recorder import Recorder

POLICY = Policy(router="softmax_topk", top_k=2)


def counted(rows):
    """A recorder that has seen some of 24 tokens, in one layer of 4 experts."""
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))[rows]
    valid = torch.ones(len(logits), dtype=torch.bool)
    recorder = Recorder("softmax_topk")
    decision = decide(POLICY, logits, valid, bias=None, training=True)
    recorder.add([decision], [Tokens(valid, valid.long())])
    return recorder


def on_rank(rank, file, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        sums = sum_over_ranks([torch.tensor([[1, 2 + rank]]), torch.tensor(0.5)])
        # rank 0 has everything but the last 5 tokens; then rank 1 has no token at all
        parts = [counted(slice(19) if rank == 0 else slice(19, 24))]
        parts += [counted(slice(24) if rank == 0 else slice(0))]
        torch.save([sums, *(part.read(sum_over_ranks) for part in parts)], f"{results}{rank}")
    finally:
        dist.destroy_process_group()


def test_two_ranks_count_what_one_would(tmp_path):
    mp.spawn(on_rank, args=(tmp_path / "meet", tmp_path / "rank"), nprocs=2)
    whole = counted(slice(24)).read()
    for rank in range(2):
        sums, split, lopsided = torch.load(tmp_path / f"rank{rank}", weights_only=False)
        assert sums[0].tolist() == [[2, 5]] and sums[0].dtype == torch.int64
        assert sums[1].item() == 1 and sums[1].shape == ()
        for counts in (split, lopsided):
            for ours, alone in zip(counts, whole, strict=True):
                torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-6)


def test_without_ranks_tensors_stay_as_they_are():
    tensors = (torch.ones(2), torch.zeros(1, 3))
    assert all(a is b for a, b in zip(sum_over_ranks(tensors), tensors, strict=True))
