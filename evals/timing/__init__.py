"""What measures time: peers in turns, ragged loads, loading, speculation, calibration, and calls over days."""
