"""Fits to calibration data: rank-r scans (`rank_fits`) and the layers behind replaced sites (`refits`), by `least_squares`."""
