"""Calls from threads that have no CUDA context yet, by a driver that takes notes."""

import threading

import pytest
import torch

from loopmdm_kernels.cuda import driver
from loopmdm_kernels.testing import looped_inputs
from tests.cuda.emulated import on_cuda
from tests.cuda.fake_driver import hopper

looped_blocks = on_cuda("looped_blocks")


@pytest.fixture
def fake(monkeypatch):
    with hopper(monkeypatch) as driver_with_notes:
        yield driver_with_notes


def inputs(**options):
    return looped_inputs(1, 20, 128, num_heads=2).to(torch.bfloat16, **options)


def in_a_thread(work):
    """What `work` returns, and the thread."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0], thread


def given_context(fake, thread):
    names = ("cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
    return tuple(fake.named(name, thread) for name in names)


def called(given):
    return looped_blocks(given.x, given.blocks, given.modulation, 2, num_heads=given.num_heads)


def test_a_fresh_thread_is_given_the_context_of_its_device(fake):
    def work():
        kernel = driver.Kernel(b"cubin", "entry", 1000)
        assert kernel.blocks_per_sm(384) == kernel.active_clusters(16, 384) == 1
        kernel.allow_large_clusters()
        driver.set_aside_l2(0)
        driver.release_l2(0)
        return kernel

    kernel, thread = in_a_thread(work)
    assert given_context(fake, thread) == (1, 1, 1)
    _, other = in_a_thread(lambda: kernel.blocks_per_sm(384))
    assert given_context(fake, other) == (1, 1, 1), "loaded in one thread, used in another"
    assert not fake.named("cuDevicePrimaryCtxRetain", threading.current_thread()), "it has one"


def test_without_it_the_driver_refuses(fake, monkeypatch):
    monkeypatch.setattr(driver, "ensure_context", lambda device: None)
    with pytest.raises(RuntimeError, match="cuModuleLoadData failed: CUDA_ERROR_INVALID_CONTEXT"):
        in_a_thread(lambda: driver.Kernel(b"cubin", "entry", 1000))


def test_a_server_thread_calls_without_gradients(fake, monkeypatch):
    """Its first call of the driver is the one that looks for weights that have changed."""
    given = inputs()
    with torch.no_grad():
        called(given)  # the weights are packed
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launches = fake.named("cuLaunchKernelEx")

    def serve():
        with torch.no_grad():
            return called(given)

    _, thread = in_a_thread(serve)
    assert given_context(fake, thread) == (1, 1, 1)
    assert fake.named("cuLaunchKernelEx", thread) == fake.named("cuLaunchKernelEx") - launches == 2


def test_gradients_are_made_in_another_thread(fake):
    """As autograd does; there the first call of the driver loads the backward kernel."""
    given = inputs(requires_grad=True)
    out = called(given)
    leaves = list(given.leaves().values())
    found, thread = in_a_thread(lambda: torch.autograd.grad(out.sum(), leaves))
    assert len(found) == len(leaves) and given_context(fake, thread) == (1, 1, 1)
    assert fake.named("cuLaunchKernelEx", thread) == 1
