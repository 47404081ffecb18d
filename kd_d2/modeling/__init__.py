"""Detectors and their parts that Detectron2 lacks; importing it fills Detectron2's registries."""
