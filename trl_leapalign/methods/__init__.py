from .base import Method, Outcome, Plan, Schedule, Trajectory
from .leapalign import LeapAlign

METHODS = {"leapalign": LeapAlign}

__all__ = ["METHODS", "LeapAlign", "Method", "Outcome", "Plan", "Schedule", "Trajectory"]
