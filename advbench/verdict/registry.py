"""All indicators, in the order in which they are computed and shown."""

from __future__ import annotations

from advbench.verdict import records
from advbench.verdict.indicator import Indicator

INDICATORS = (
    Indicator(
        id="weak_attack",
        weight="thin",
        kind="records",
        question="number",
        cost="free",
        about="The protocol is a single attack, not a suite: a stronger one may leave less.",
        source="Carlini et al. 2019, arXiv 1902.06705",
        settles="protocol=autoattack",
        measure=records.weak_attack,
    ),
    Indicator(
        id="black_box",
        weight="proof",
        kind="black box",
        question="gradient",
        cost="free",
        about=(
            "The share of the samples left by the gradient that fall to Square or to transferred "
            "images. An honest gradient leaves next to nothing to them. Proof if the lower end of "
            "its exact 95 % interval is above 5 %, evidence above 1 %."
        ),
        source="Athalye et al. 2018, arXiv 1802.00420, section 3.1",
        settles="protocol=adaptive",
        measure=records.black_box,
    ),
)
"""A new indicator is a function in the file of its family and an entry here."""
