"""Reference files of detectors that kdjax does not have yet: remove a line with the detector that it waits for."""

CHECKS = []
