"""``python -m kd_d2.doctor``: what is installed, and whether a config would train.

Only ``__main__`` is the command. Nothing is imported here, so that it can speak about an
environment in which Detectron2 does not import.
"""
