"""What a learned scalar may be trusted for, and what makes it trustworthy: certificates and calibration."""

from engine.certificate.calibration import Calibrated, Calibration, calibrate
from engine.certificate.certificate import Certificate, Check
from engine.certificate.certify import certify
from engine.certificate.domain import Domain

__all__ = ["Calibrated", "Calibration", "Certificate", "Check", "Domain", "calibrate", "certify"]
