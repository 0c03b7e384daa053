"""Compute plans: which weights, and how many loops, at every denoising step."""

from __future__ import annotations

from loopmdm.model.loop_law import MAX_LOOPS
from loopmdm.plan.compute import Segment, StepCompute
from loopmdm.plan.plan import ComputePlan, as_plan

__all__ = ["MAX_LOOPS", "ComputePlan", "Segment", "StepCompute", "as_plan"]
