"""All indicators, in the order in which they are computed and shown."""

from __future__ import annotations

from advbench.verdict import gradients, outputs, planted, records, stronger
from advbench.verdict.indicator import Indicator

PINTOR = "Pintor et al. 2022, arXiv 2106.09947"
CARLINI = "Carlini et al. 2019, arXiv 1902.06705"
ATHALYE = "Athalye et al. 2018, arXiv 1802.00420"
AUTOATTACK = "Croce & Hein 2020, arXiv 2003.01690"
FALL = "Proof if the number falls below its own 95 % interval by them, else evidence."

INDICATORS = (
    Indicator(
        id="weak_attack",
        weight="thin",
        kind="effort",
        question="number",
        cost="free",
        about=(
            "The protocol is a single attack, not a suite: a stronger one may leave less. Evidence "
            "if it follows a gradient alone that is declared discontinuous or straight through."
        ),
        source=CARLINI,
        settles="protocol=autoattack",
        measure=records.weak_attack,
    ),
    Indicator(
        id="stronger_search",
        weight="proof",
        kind="search",
        question="number",
        cost="cheap",
        about=(
            "Of a protocol that is a single attack: the search of `protocol=express` breaks images "
            f"that it left. {FALL}"
        ),
        source=CARLINI,
        settles="protocol=autoattack",
        measure=stronger.stronger_search,
        rests_on=("survivors",),
    ),
    Indicator(
        id="probabilities",
        weight="proof",
        kind="outputs",
        question="gradient",
        cost="cheap",
        about=(
            "The model ends in a softmax, so its gradient vanishes where it is sure. Outputs in "
            "[0, 1] that do not sum to 1, as of sigmoids, are evidence."
        ),
        source="Carlini & Wagner 2016, arXiv 1607.04311",
        settles="return what is before the softmax, or traits.output=probabilities",
        measure=outputs.probabilities,
    ),
    Indicator(
        id="stochastic_mismatch",
        weight="proof",
        kind="outputs",
        question="number",
        cost="cheap",
        about=(
            "Two passes of the same images differ though the model is declared deterministic, or "
            "agree though it is declared stochastic. Images off the grid of 8-bit values count too."
        ),
        source=f"{AUTOATTACK} (its checks)",
        settles="traits.stochastic=true, or remove the noise",
        measure=outputs.stochastic_mismatch,
    ),
    Indicator(
        id="batch_mismatch",
        weight="proof",
        kind="outputs",
        question="number",
        cost="cheap",
        about="An image has other logits alone than in the batches that the search uses.",
        source="ours",
        settles="traits.batch_dependent=true traits.batch_size=NUMBER",
        measure=outputs.batch_mismatch,
    ),
    Indicator(
        id="tiny_change",
        weight="evidence",
        kind="noise",
        question="number",
        cost="cheap",
        about=(
            "The share of images whose logits move by more than 1 % of their spread if each pixel "
            "changes by 0.0001, a fortieth of an 8-bit step: noise that is computed from the image "
            "itself, or another trick that a gradient cannot show."
        ),
        source="ours",
        settles="draw the noise anew in each pass (traits.stochastic=true), or remove it",
        measure=outputs.tiny_change,
    ),
    Indicator(
        id="zero_gradient",
        weight="proof",
        kind="gradient",
        question="gradient",
        cost="cheap",
        about=(
            "The share of survivors whose gradient is zero, or no number, for cross-entropy and "
            "margin at the start, in the middle and at the end of a search. Cross-entropy alone "
            "is saturation, which the other losses do not mind."
        ),
        source=f"{PINTOR} (unavailable gradients)",
        settles="protocol=adaptive",
        measure=gradients.zero_gradient,
        rests_on=("left_by_gradient",),
    ),
    Indicator(
        id="gradient_mismatch",
        weight="evidence",
        kind="gradient",
        question="gradient",
        cost="cheap",
        about=(
            "The median cosine between the gradient and central differences along 8 random "
            "directions, with a short step and with one of eps/2; the better of the two counts. An "
            "honest gradient has 1."
        ),
        source=f"{PINTOR} (unstable gradients)",
        settles="protocol=adaptive",
        measure=gradients.gradient_mismatch,
        rests_on=("correct",),
    ),
    Indicator(
        id="unbounded",
        weight="proof",
        kind="gradient",
        question="gradient",
        cost="cheap",
        about=(
            "A search along the gradient that may change the image at will leaves samples right. "
            "An honest gradient leaves none."
        ),
        source=f"{ATHALYE}, section 3.1",
        settles="protocol=adaptive",
        measure=gradients.unbounded,
        rests_on=("correct",),
    ),
    Indicator(
        id="one_step",
        weight="proof",
        kind="search",
        question="number",
        cost="cheap",
        about=(
            f"A single step along the gradient breaks samples that the whole search did not. {FALL}"
        ),
        source=f"{ATHALYE}, section 3.1",
        settles="protocol=adaptive",
        measure=gradients.one_step,
        rests_on=("survivors",),
    ),
    Indicator(
        id="noise",
        weight="proof",
        kind="noise",
        question="number",
        cost="cheap",
        about=(
            "Random points at the edge of the ball break samples that the search along the "
            f"gradient did not. {FALL}"
        ),
        source=f"{ATHALYE}, section 3.1",
        settles="protocol=square",
        measure=gradients.noise,
        rests_on=("left_by_gradient", "survivors"),
    ),
    Indicator(
        id="logit_scale",
        weight="proof",
        kind="scale",
        question="number",
        cost="cheap",
        about=(
            "The same search on logits divided by 10 and 100 breaks samples that it does not break "
            f"on the logits as they are. Only those broken in addition count. {FALL}"
        ),
        source=CARLINI,
        settles="protocol=apgd protocol.loss=dlr",
        measure=gradients.logit_scale,
        rests_on=("survivors",),
    ),
    Indicator(
        id="monotone",
        weight="evidence",
        kind="search",
        question="gradient",
        cost="dear",
        about="Over four radii up to 2 eps, a search breaks fewer samples in a larger ball.",
        source=f"{ATHALYE}, section 3.1",
        settles="protocol=curve",
        measure=gradients.monotone,
        rests_on=("correct",),
    ),
    Indicator(
        id="loss_gap",
        weight="evidence",
        kind="loss",
        question="gradient",
        cost="dear",
        about=(
            "Searches on cross-entropy, margin and DLR break different samples, by more than two "
            "seeds of one loss do."
        ),
        source=AUTOATTACK,
        settles="protocol=autoattack",
        measure=gradients.loss_gap,
        rests_on=("correct",),
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
        source=f"{ATHALYE}, section 3.1",
        settles="protocol=adaptive",
        measure=records.black_box,
    ),
    Indicator(
        id="audit",
        weight="proof",
        kind="search",
        question="number",
        cost="free",
        about=(
            "Of `protocol=express` that did not escalate: AutoAttack breaks more than 1 % of the "
            f"survivors that it audits. {FALL}"
        ),
        source="ours",
        settles="protocol.escalate=true, or protocol.audit=all",
        measure=records.audit,
    ),
    Indicator(
        id="surrogate_gap",
        weight="evidence",
        kind="surrogate",
        question="gradient",
        cost="free",
        about=(
            "The share of the samples left by the model's own gradient that fall to that of "
            "a surrogate. The number has what they broke in it."
        ),
        source=f"{PINTOR} (transfer failure)",
        settles="protocol=adaptive",
        measure=records.surrogate_gap,
    ),
    Indicator(
        id="unconverged",
        weight="thin",
        kind="effort",
        question="number",
        cost="free",
        about=(
            "The share of the samples left that the last quarter of the steps of the last white-box"
            " stage still breaks. Evidence if the lower end of its interval is above 5 %."
        ),
        source=f"{PINTOR} (incomplete optimisation)",
        settles="protocol=adaptive",
        measure=records.unconverged,
    ),
    Indicator(
        id="eot_plateau",
        weight="thin",
        kind="effort",
        question="number",
        cost="free",
        about="Of a stochastic model: means over the most draws still break samples.",
        source=f"{ATHALYE}, section 4 (EOT)",
        settles="protocol=adaptive protocol.draws=50",
        measure=records.eot_plateau,
    ),
    Indicator(
        id="planted",
        weight="proof",
        kind="gradient",
        question="gradient",
        cost="dear",
        about=(
            "Near each of a few images an adversarial image of a binary readout of the features is "
            "planted, so that one exists for certain. The search of the protocol, on that readout, "
            "has to find it. Proof if the lower end of the exact 95 % interval of the share that "
            "it misses is above 10 %, evidence above 5 %; thin if the protocol is a single attack, "
            "which may be too weak for any model."
        ),
        source="Zimmermann et al. 2022, arXiv 2206.13991",
        settles="protocol=adaptive, with surrogates that follow another gradient",
        measure=planted.planted,
        rests_on=("correct", "searches"),
    ),
    Indicator(
        id="silent_success",
        weight="proof",
        kind="records",
        question="number",
        cost="cheap",
        about=(
            "A search of the evaluation, repeated on a few survivors, passes through an image that "
            "fools the model. Either its logits are not steady (evidence), or advbench is wrong."
        ),
        source=f"{PINTOR} (silent success)",
        settles="report it, please: it is a mistake of advbench",
        measure=records.silent_success,
        rests_on=("survivors", "searches"),
    ),
    Indicator(
        id="norm",
        weight="proof",
        kind="records",
        question="number",
        cost="cheap",
        about=(
            "An adversarial image that was kept lies outside of the ball or of [0, 1], or does not "
            "fool the model when it is scored again. Here the number would be too low."
        ),
        source="ours",
        settles="advbench verify RUN",
        measure=records.norm,
        rests_on=("images",),
    ),
)
"""A new indicator is a function in the file of its family and an entry here."""
