"""Every threshold of the sanity checks, of the linter and of the protocols.

They are shares of images unless said otherwise. The linter compares a share's lower end of its 95 % Wilson interval
with the threshold (`zoo.evaluation.intervals.exceeds`), so that one image among few raises no alarm. Protocols have
1,000 images or more and compare the share itself.
"""

from __future__ import annotations

from typing import Final

# --- of the linter and of protocols ---

ONE_STEP_ALONE: Final = 0.03
"""S2, whitebox: broken by one step and not by many (Carlini et al. 2019: none should be; a few are luck)."""
LATE_GAIN: Final = 0.02
"""S3, whitebox: broken only by twice the steps or by a second start. whitebox asks the same of attacks on the weights
of an int8 graph: what the graph keeps and the weights lose."""
LOSS_GAP: Final = 0.05
"""G2, whitebox: broken by a scale-free loss, or towards another class, and not by cross-entropy; honest models show 1
to 4 points by another loss, and up to 10 towards the nearest classes (the zoo's TRADES: 7 of 71)."""
BLACK_BOX_ALONE: Final = 0.01
"""W1, Q2, autoattack: broken by queries, noise or transfer and by no gradient (AutoAttack's flag allows none)."""

# --- of the linter alone ---

STILL_RISING: Final = 0.2
"""S3: part of the loss gained by the last ten of forty steps; a line that rises evenly has 0.25 there."""
FEW_LEFT: Final = 0.05
"""S3: where cross-entropy leaves no more than this, their loss may still rise."""
CURVE_RISE: Final = 0.03
"""S4: more answered correctly at a larger eps."""
LEFT_OVER: Final = 0.05
"""S4, S5: what attacks without bounds may leave, whatever the number of classes: none should be, a few are luck."""
SILENT: Final = 0.02
"""S6: fooled on the way and right again at the end (Pintor et al. 2022, "silent success")."""
OUTSIDE: Final = 1e-6
"""S7: how far beyond eps a pixel may be, in pixel units: rounding in float32. The protocol queries allows the same."""
FEWEST_FINITE: Final = 3
"""O1: finite outputs of an image (all of them where there are fewer classes), which scale-free losses need."""
NO_GRADIENT: Final = 0.01
"""G1: images with a gradient of zero; none may have NaN."""
EXPLAINED: Final = 0.1
"""G3: part of a true change that gradients must account for."""
UNEXPLAINED_IMAGES: Final = 0.5
"""G3: the share of images where gradients may account for less."""
COVERED: Final = 0.8
"""G4: part of the change along directions of one kind that gradients must account for. It is 1 for every function that
its gradient is the slope of; the bundled models show 0.94 or more."""
NOTABLE: Final = 1e-3
"""G3, G4, X1: the smallest change that is judged, as part of the mean margin: below it is rounding."""
ROUNDING_STEPS: Final = 8
"""And the same in steps of the number type of the model, of the size of its largest logits."""
REPEATED: Final = 1e-4
"""R1: difference between answers to the same images, as part of the mean size of a logit (GPU sums vary by 1e-6)."""
COUPLED: Final = 1e-3
"""B1: the same between a batch and its images one by one; other kernels sum in another order. In half precision the
limit is `ROUNDING_STEPS` steps of the number type, if that is more."""
EOT_GAIN: Final = 0.02
"""E1: accuracies after attacks with one draw and with many may differ by this, or by two standard errors."""
SELF_REPORT_GAP: Final = 0.05
"""E2: the same of an accuracy that an attack reports of itself and one on fresh draws."""
FIXED_GAP: Final = 0.05
"""E3: the same of a known draw and of unknown ones."""
SURROGATE_SUCCESS: Final = 0.9
"""T1: of the surrogate's own images, how many must fool it (Pintor et al. 2022)."""
SERVED_DISAGREEMENT: Final = 0.001
"""P1: of the answers; the share itself is compared, since the two should be the same function."""
PLANTED_MISSED: Final = 0.05
"""X1: of the planted examples."""
ROUNDED_AWAY: Final = 0.03
"""Q1: broken on the weights and not on the graph that rounds them."""

# --- of protocols alone ---

SILENT_GRADIENTS: Final = 0.05
"""whitebox, random-gates: images with a gradient of zero."""
LEFT_AT_HALF: Final = 0.02
"""whitebox, random-gates: what an attack at eps 0.5 may leave; the ball holds plain grey then."""
NOISE_GAP: Final = 0.03
"""whitebox: random signs may leave less than PGD by this."""
DRAWS_GAP: Final = 0.02
"""random-gates: the same of every comparison of accuracies over draws."""
OTHER_EXIT_GAP: Final = 0.03
"""exits: an attack on another exit may harm an exit more by this than the attack on itself."""
