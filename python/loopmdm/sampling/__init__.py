"""Sampling from a masked diffusion model: prompts, infilling, decoding orders, compute plans."""

from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.orders import ORDERS
from loopmdm.sampling.remasking import Remasking
from loopmdm.sampling.result import SampleResult, StepEvent
from loopmdm.sampling.sampler import sample

__all__ = ["ORDERS", "Decoding", "Remasking", "SampleResult", "StepEvent", "sample"]
