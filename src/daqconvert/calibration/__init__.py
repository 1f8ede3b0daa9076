"""Calibration: the bounds, signs and output scales of a quantized model, found from data."""

from daqconvert.calibration.calibrating import CalibratedInput, CalibrationReport, calibrate, is_calibrated

__all__ = ["CalibratedInput", "CalibrationReport", "calibrate", "is_calibrated"]
