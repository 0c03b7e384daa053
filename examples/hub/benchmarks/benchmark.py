"""`kernels benchmark FOLDER`: the ops beside plain PyTorch, at the sizes of MDLM's small model."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

BATCH, LENGTH, HIDDEN, HEADS, VOCABULARY, LOOPS = 4, 512, 768, 12, 50258, 4


class LoopedBlocksBenchmark(Benchmark):
    """One block applied several times."""

    seed = 0

    def setup(self):
        def normal(*shape):
            return 0.02 * torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

        self.x = torch.randn(BATCH, LENGTH, HIDDEN, device=self.device)
        ones = torch.ones(HIDDEN, device=self.device)
        self.block = self.kernel.BlockWeights(
            *(ones, normal(3 * HIDDEN, HIDDEN), normal(HIDDEN, HIDDEN), ones),
            *(normal(4 * HIDDEN, HIDDEN), normal(4 * HIDDEN), normal(HIDDEN, 4 * HIDDEN), normal(HIDDEN)),
        )
        self.modulation = 0.1 * torch.randn(1, 1, 6, HIDDEN, device=self.device, dtype=torch.bfloat16)

    def benchmark_base(self):
        self.out = self.kernel.looped_blocks(
            self.x, [self.block], self.modulation, LOOPS, num_heads=HEADS, compute_dtype=torch.bfloat16
        )

    def verify_base(self):
        x, block = self.x, self.block
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation[0, 0].unbind()

        def modulated(norm, shift, scale):
            rows = F.layer_norm(x, x.shape[-1:], norm)
            return (rows * (1 + scale) + shift).bfloat16()

        for _ in range(LOOPS):
            qkv = F.linear(modulated(block.norm1, shift1, scale1), block.qkv)
            q, k, v = qkv.view(BATCH, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + gate1 * F.linear(mixed, block.attn_out)
            h = F.linear(modulated(block.norm2, shift2, scale2), block.mlp_in, block.mlp_in_bias)
            x = x + gate2 * F.linear(F.gelu(h, approximate="tanh"), block.mlp_out, block.mlp_out_bias)
        return x


class MaskedCrossEntropyBenchmark(Benchmark):
    """The loss of half of the positions."""

    seed = 0

    def setup(self):
        self.hidden = torch.randn(BATCH, LENGTH, HIDDEN, device=self.device)
        self.norm = torch.ones(HIDDEN, device=self.device)
        self.weight = 0.02 * torch.randn(VOCABULARY, HIDDEN, device=self.device, dtype=torch.bfloat16)
        self.targets = torch.randint(VOCABULARY, (BATCH, LENGTH), device=self.device)
        self.rows = torch.arange(0, BATCH * LENGTH, 2, device=self.device)

    def benchmark_base(self):
        head = self.kernel.Head.of(self.weight, norm=self.norm)
        _, self.out = self.kernel.masked_cross_entropy(self.hidden, head, self.targets, self.rows)

    def verify_base(self):
        rows = F.layer_norm(self.hidden.flatten(0, 1)[self.rows], (HIDDEN,), self.norm)
        logits = F.linear(rows.bfloat16(), self.weight)
        return F.cross_entropy(logits.float(), self.targets.flatten()[self.rows], reduction="none")
