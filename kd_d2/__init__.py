"""Knowledge distillation for object detectors, as a Detectron2 extension.

Importing this package only defines the version: registries are filled when the sub-packages
are imported, data sets are registered by :func:`kd_d2.data.register_all`.
"""

__version__ = "0.1.0"
