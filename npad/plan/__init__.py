"""What a fit and its model take of a device's memory, counted before the work."""

from __future__ import annotations

from npad.plan.alternatives import Alternative, alternatives, hollow_networks, refuse
from npad.plan.counting import planned
from npad.plan.figures import MemberPlan, Phase, Plan

__all__ = [
    "Alternative",
    "MemberPlan",
    "Phase",
    "Plan",
    "alternatives",
    "hollow_networks",
    "planned",
    "refuse",
]
