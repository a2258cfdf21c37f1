"""What keeps a run within bounds: policies that decide, and what acts on their decisions."""

from entropylens.control.guard import Action, StepGuard
from entropylens.control.policies import POLICIES
from entropylens.control.step_bound import MODES, StepBound

__all__ = ["MODES", "POLICIES", "Action", "StepBound", "StepGuard"]
