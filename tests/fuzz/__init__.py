"""Random calls of the whole public API: each is right by `oracle`, or refused with a documented
exception that names an argument at fault.

    python -m tests.fuzz --n 1000000 --seed 0 --workers 2     # prints counts by outcome
    python -m tests.fuzz --seed 0 --only 4711                 # repeats one call

A call is a function of the seed and its index. Its arguments are valid, or one or two of them are
replaced by something wrong; a call that must be refused and is not, or the reverse, is a failure.
So is a refusal that is not raised by a `raise` statement of dice_core with the argument's name in
the text, and any warning. Of an accepted call these are checked:

- sums, losses, gradients, decisions, against the truth in extended precision, within the error that
  naive code in the same precision may make (`oracle`); NaN and infinities where they belong;
- bitwise the same again, with another number of threads; from torch as from arrays; from statistics
  added up tile by tile, the same within that error;
- x, y and all memory around `out` unchanged; gradients of ignored voxels exactly 0.
- with inplace=True bitwise the same, and x holds its gradient.

Of dice_core.compat only shapes, dtypes and refusals are checked, and that gradients are finite.

What is accepted and cannot be compared is counted by reason, and all other checks still hold:

- "sensitive": over the error that its sums may have, a loss or its derivative is not nearly linear
  (its change differs from the first order by a factor of 3, or the derivative varies by 10 %).
  These are ratios close to 0/0, where all probabilities of a class underflow, kinks (floor, eps,
  (1 - q)^g at 0), and square roots at 0. The gradient must be finite where the true one is.
- "overflow": the truth, or a factor of it, is beyond the range of the arithmetic.
- "underflow": a class whose sum of s^p underflows is 0/0 with empty="nan", smooth/0 with a smooth
  of the numerator alone, and so is its gradient.
- "not finite": a counted NaN or infinity makes sums not finite. The loss is still compared, NaN for
  NaN; the gradients of such samples are not.
- "infinite logits in binary cross-entropy": its two sums may be NaN or infinite by torch's formula.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as in pytest
