"""A step equals that of one device where devices cut the sequence, and in an unnamed layout.

It is a file beside test_mesh.py, so that two workers share the meshes.
"""

import pytest
from test_mesh import MODEL, check_step

from sharding.rules import layout

OWN = layout(  # pairs that no named layout has, and axes out of order
    act_batch="expert fsdp",
    act_seq="context",
    experts="fsdp expert",
    expert_embed="context",
    embed="context fsdp",
    heads="expert",
    groups="expert",
    group_in="context",
    vocab=None,
    streams_embed=("fsdp", "expert"),
    norm="context",
)
CASES = [
    ("context=8", "cp_ep"),
    ("context=4,expert=2", "cp_ep"),
    ("fsdp=2,context=2,tensor=2", "full"),
    ("slice=2,fsdp=2,context=2", "full"),
    ("expert=8", "pod"),
    ("fsdp=2,context=2,expert=2", OWN),
]
IN_CI = ("expert=8", "pod")


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        pytest.param(*one, marks=pytest.mark.slow if one == IN_CI else pytest.mark.long)
        for one in CASES
    ],
)
def test_a_step_of_more_layers_on_eight_devices_is_the_step_on_one(mesh, layout):
    check_step(MODEL, mesh, layout)
