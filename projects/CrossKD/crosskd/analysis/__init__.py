"""What the paper's figures 2, 4, 5 and 7 show, computed for any pair of dense detectors.

The commands are in ``projects/CrossKD/tools``. All of them look at the very tensors that training
compares: a probe among the distillers of a :class:`kd_d2.distillation.KDModel`.
"""
