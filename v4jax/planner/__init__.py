"""The layout lab: what a layout costs a model, compiled for any devices or estimated.

Next file to read: v4jax/planner/hardware.py.
"""

from v4jax.planner.compiled import LayoutReport, report_layout
from v4jax.planner.expert_bytes import least_expert_bytes, sent_to_experts
from v4jax.planner.hardware import Hardware, hardware_of

__all__ = [
    "Hardware",
    "LayoutReport",
    "hardware_of",
    "least_expert_bytes",
    "report_layout",
    "sent_to_experts",
]
