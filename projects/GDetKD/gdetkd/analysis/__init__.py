"""What the paper's figures 5 and 6 show, computed for any pair that GDetKD distils.

The commands are in ``projects/GDetKD/tools``. They look at RoIs that the student samples as in
training, at a fixed state of both networks.
"""
