"""Which feature passes through which head, and what is compared with what (Fig. 6).

With A(x; y) the alignment of x to the statistics of y, S and T the heads, i the position:

========  ==================================  ============  ===================================
strategy  cross prediction                    loss between  student parameters with a gradient
========  ==================================  ============  ===================================
a         p^s_c = T_{>i}(A(f_i^s; f_i^t))     p^s_c, p^t    stages <= i, pyramid, backbone
b         p^t_c = S_{>i}(A(f_i^t; f_i^s))     p^s, p^t_c    all
c         p^s_c as in a                       p^s, p^s_c    all
d         p^t_c as in b                       p^t_c, p^t    stages > i, predictors, scales
========  ==================================  ============  ===================================

b and d run the student's own layers a second time; normalisation with running statistics there
(BN in a head) would see the teacher's features, too. The paper's heads have GN.
"""

from dataclasses import dataclass
from typing import Dict

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """One of Fig. 6.

    Attributes:
        moved: side whose feature passes through the other side's head, giving the cross
            prediction: "student" or "teacher".
        prediction: what receives the gradient: "cross" or "student".
        target: what it is compared with: "teacher" or "cross".
    """

    moved: str
    prediction: str
    target: str


STRATEGIES: Dict[str, Strategy] = {
    "a": Strategy("student", "cross", "teacher"),
    "b": Strategy("teacher", "student", "cross"),
    "c": Strategy("student", "student", "cross"),
    "d": Strategy("teacher", "cross", "teacher"),
}
