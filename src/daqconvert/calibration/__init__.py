"""Bounds, signs and output scales from data."""

from daqconvert.calibration.calibrating import CalibratedInput, CalibrationReport, calibrate, is_calibrated

__all__ = ["CalibratedInput", "CalibrationReport", "calibrate", "is_calibrated"]
