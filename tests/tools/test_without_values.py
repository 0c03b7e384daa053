"""Tensors without values, exported and traced programs: shapes and results are those of a call."""

from __future__ import annotations

import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

import loopmdm_kernels as lk
from loopmdm import LoopMDM
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head


def test_meta(model, tokens):
    with torch.device("meta"):
        empty = LoopMDM(model.config).eval()
    out = empty(tokens.to("meta"))
    assert out.is_meta and out.shape == (2, 16, 40) and out.dtype == torch.float32
    assert empty.bfloat16()(tokens.to("meta")).dtype == torch.bfloat16


def test_meta_ops():
    hidden, head = head_inputs(2, 4, 8, 10)
    on_meta = Head(*(t.float().to("meta") for t in head[:4]), -1)
    hidden, rows = hidden.float().to("meta"), torch.arange(4, device="meta")
    sampled = lk.sample_rows(
        hidden, on_meta, rows, row_rng(4)._replace(sequence=rows, step=rows, position=rows)
    )
    assert sampled.token.is_meta and sampled.token.shape == (4,) and sampled.token.dtype == torch.int64
    targets = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    total, nll = lk.masked_cross_entropy(hidden, on_meta, targets, rows, rows.float())
    assert total.is_meta and total.shape == () and nll.shape == (4,)
    q = torch.empty(2, 3, 8, 4, device="meta")
    assert lk.attention(q, q, q).shape == q.shape


def test_fake_tensors(model, tokens):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert LoopMDM(model.config).eval()(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 40)


def test_export_with_any_batch_and_length(model, tokens):
    shapes = {"input_ids": {0: Dim("B", min=1, max=64), 1: Dim("L", min=2, max=16)}}
    program = export(model, (tokens,), dynamic_shapes=shapes)
    assert any("loopmdm.looped_blocks" in str(node.target) for node in program.graph.nodes)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for shape in ((2, 16), (3, 9), (1, 2)):
        ids = torch.randint(39, shape)
        torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(model, tokens):
    with torch.no_grad():
        traced = torch.jit.trace(model, (tokens,))
        saved = io.BytesIO()
        torch.jit.save(traced, saved)
        saved.seek(0)
        other = tokens.flip(0, 1)
        torch.testing.assert_close(torch.jit.load(saved)(other), model(other), rtol=1e-5, atol=1e-5)
